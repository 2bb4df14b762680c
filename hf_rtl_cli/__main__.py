"""`python -m hf_rtl_cli` is `hf-rtl`."""

import sys

from .main import main


sys.exit(main())
