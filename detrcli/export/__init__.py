"""Exported models: files that other programs run, verified against the model they came from, and run again here.

plan          Request               what is wanted, and whether it can be had; free of torch
graph         trace -> Program      the model as one graph of operators, with variable axes
onnx · program · openvino           the graph as a file, each with its description inside
attention                           deformable attention in standard ONNX operators
description   Description           model, classes, pictures, weights; travels in every file
runtime       load -> Predictor     a file as a model that predicts and is evaluated like any other
pictures      batches               what both are given
verify        verify -> Report      the file's answers against the model's
workplace     workplace             a folder in which a file is whole before it gets its name
run           export -> Report      all of it: nothing gets its name before it has passed
"""
