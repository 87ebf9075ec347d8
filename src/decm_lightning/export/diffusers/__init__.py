"""Write networks as folders that diffusers loads, with the code that they need.

The modules `flow_map_*` are loaded by diffusers: transformers and pipelines. `bundle` turns each of them into one
self-contained file. `writing` is the entry point.
"""
