"""`python -m hf_vlm.cli`, for launchers that start modules."""

import sys

from hf_vlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
