"""The `hf-rtl` command. It is a separate package because importing `hf_rtl` loads torch, too slow for `--help`."""
