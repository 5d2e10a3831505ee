"""Diffusion probabilistic models: processes, networks, training, sampling, and a likelihood bound.

Names are loaded when they are first used, so that `import dpm_fast` is quick and needs none of the
optional packages.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpm_fast import compat as compat
    from dpm_fast import data as data
    from dpm_fast import noise as noise
    from dpm_fast import ops as ops
    from dpm_fast import reference as reference
    from dpm_fast import run as run
    from dpm_fast import schedules as schedules
    from dpm_fast.binomial import BinomialDiffusion as BinomialDiffusion
    from dpm_fast.bound import Bound as Bound
    from dpm_fast.compat import likelihood as likelihood
    from dpm_fast.config import TrainConfig as TrainConfig
    from dpm_fast.dispatch import info as info
    from dpm_fast.dispatch import use_backend as use_backend
    from dpm_fast.entropy import entropies as entropies
    from dpm_fast.entropy import entropy_of_trajectory as entropy_of_trajectory
    from dpm_fast.gaussian import GaussianDiffusion as GaussianDiffusion
    from dpm_fast.importance import Importance as Importance
    from dpm_fast.model import DiffusionModel as DiffusionModel
    from dpm_fast.networks import MLP as MLP
    from dpm_fast.networks import ConvDenseNetwork as ConvDenseNetwork
    from dpm_fast.networks import MultiscaleConv as MultiscaleConv
    from dpm_fast.networks import RBFNetwork as RBFNetwork
    from dpm_fast.networks import TemporalReadout as TemporalReadout
    from dpm_fast.particles import WeightedSamples as WeightedSamples
    from dpm_fast.sampling import Posterior as Posterior
    from dpm_fast.trainer import Trainer as Trainer
    from dpm_fast.weights_2015 import load_2015_weights as load_2015_weights

try:
    __version__ = version("dpm_fast")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+uninstalled"

_MODULE_OF = {
    "BinomialDiffusion": "binomial",
    "Bound": "bound",
    "ConvDenseNetwork": "networks",
    "DiffusionModel": "model",
    "GaussianDiffusion": "gaussian",
    "Importance": "importance",
    "MLP": "networks",
    "MultiscaleConv": "networks",
    "Posterior": "sampling",
    "RBFNetwork": "networks",
    "TemporalReadout": "networks",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "WeightedSamples": "particles",
    "entropies": "entropy",
    "entropy_of_trajectory": "entropy",
    "info": "dispatch",
    "likelihood": "compat",
    "load_2015_weights": "weights_2015",
    "use_backend": "dispatch",
}
__all__ = [*_MODULE_OF]
_MODULES = (
    "compat",
    "data",
    "noise",
    "ops",
    "reference",
    "run",
    "schedules",
)  # as attributes, when used


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"dpm_fast.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dpm_fast' has no attribute {name!r}")
    return getattr(import_module(f"dpm_fast.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
