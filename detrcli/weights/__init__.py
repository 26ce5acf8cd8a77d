"""Weights: which ones a name means, where they come from, what is in the file, how it gets into a model.

resolve    choose(model, weights) -> Choice            the user's words to a file or a Hub reference; torch-free
hub        fetch(reference) -> Fetched                 pinned, hashed, from the cache first
file       save / load                                 safetensors with a hash inside; pickles read safely
metadata   Metadata                                    model, config, classes, pictures; travels in the file
keymap     apply / revert                              foreign names to ours and back
load       load_weights / load_state -> LoadReport     into a model, total and reported
"""
