"""
What writes the pages of the repository from the results of runs: model_cards/ and docs/claims.md. Modules import
hf_rtl and `shared`; what trains, evaluates or measures does not belong here.
"""
