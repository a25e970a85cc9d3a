"""``python -m mlip_md.trainer RECIPE …``: the same as ``mlip-md train RECIPE …``."""

import sys

from mlip_md.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
