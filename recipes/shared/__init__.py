"""
What the commands of recipes/ share: arguments, data, methods, controls, tables and pictures, one idea per module.
Modules import hf_rtl and each other. They are not run, and import no command, page or benchmark.
"""
