"""`python -m dpm_fast` is `dpm-fast`, for torchrun and for what is not installed."""

import sys

from dpm_fast.cli import main

sys.exit(main())
