"""
Modules that write model_cards/ and docs/claims.md from the results of runs, and draw docs/tickets.png. They import
hf_rtl and `shared`. Code that trains, evaluates or measures does not belong here.
"""
