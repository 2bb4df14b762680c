"""
What several commands of recipes/ need: their arguments, data, methods, controls, tables and pictures. Modules import
hf_rtl and each other, never a command, a page or a benchmark; what one command alone needs stays in that command.
"""
