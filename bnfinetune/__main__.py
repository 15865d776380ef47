"""`python -m bnfinetune`, also under `accelerate launch -m` and `torchrun -m`."""

import sys

from bnfinetune.cli import main

if __name__ == "__main__":
    sys.exit(main())
