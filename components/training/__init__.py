"""What the steps that train share.

- `params`: the parameters of a training
- `penalty`: the penalties on the weights
- `network`: the Keras model
- `engine`: the compiled training loop
- `checkpoint`: the file from which a training resumes
"""
