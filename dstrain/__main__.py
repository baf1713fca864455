"""`python -m dstrain`, which is also what `deepspeed --module dstrain` starts."""

import sys

from dstrain.cli.main import main

sys.exit(main())
