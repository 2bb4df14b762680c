"""
The model, and all that travels with it to the Hub as custom code: what it computes, how it is built, saved and shared.

Files here import each other with single dots, and otherwise the stock packages of a Hub repository with custom code
alone (torch, numpy, safetensors, transformers, huggingface_hub, timm). Data sets, training, pages and plots do not
belong here.
"""
