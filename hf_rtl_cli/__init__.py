"""The `hf-rtl` command. A package of its own: importing `hf_rtl` loads torch, which is too slow for `--help`."""
