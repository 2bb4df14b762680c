"""
What the commands of recipes/ are made of: arguments, data, methods, controls, tables and pictures, one idea a module.
Modules import hf_rtl and each other; what is run, or imports a command, a page or a benchmark, does not belong here.
"""
