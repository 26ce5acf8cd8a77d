"""What a model costs: parameters, multiply-adds, time and memory, by part."""
