"""The ops: what a fused kernel computes, each with its contract, checks, schema and gradient.

Every function here takes any device and dtype that its docstring names. The reference in plain
PyTorch (`dpm_fast.reference`) runs where no kernel is built, or where `dpm_fast.use_backend` asks
for it.
"""

from dpm_fast.ops.bernoulli import bernoulli_kl as bernoulli_kl
from dpm_fast.ops.bernoulli import bernoulli_noise as bernoulli_noise
from dpm_fast.ops.bernoulli import bernoulli_step as bernoulli_step
from dpm_fast.ops.bernoulli import bernoulli_step_ as bernoulli_step_
from dpm_fast.ops.image_network import image_network as image_network
from dpm_fast.ops.kl import kl as kl
from dpm_fast.ops.multiscale_conv import multiscale_conv as multiscale_conv
from dpm_fast.ops.multiscale_conv import multiscale_conv_stack as multiscale_conv_stack
from dpm_fast.ops.noise import noise as noise
from dpm_fast.ops.noise import normal as normal
from dpm_fast.ops.noise import uniform as uniform
from dpm_fast.ops.noise import words as words
from dpm_fast.ops.readout import readout as readout
from dpm_fast.ops.step import step as step
from dpm_fast.ops.step import step_ as step_
