"""`python -m hf_rtl_cli` is the same as `hf-rtl`."""

import sys

from .main import main


sys.exit(main())
