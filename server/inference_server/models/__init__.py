"""Where models come from: the default model, hub ids, safetensors folders and GGUF files. Imports no torch.

Only safetensors and GGUF weights are read, never pickles, and no code that comes with a model is run.
"""
