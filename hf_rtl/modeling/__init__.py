"""
The model, and all that travels with it to the Hub as custom code: what it computes, how it is built, saved and shared.

Files here import each other with single dots. Otherwise they import only packages that custom code on the Hub can
expect (torch, numpy, safetensors, transformers, huggingface_hub, timm). Data sets, training, cards and plots do not
belong here.
"""
