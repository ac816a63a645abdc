"""What the steps that train share.

- `params`: the parameters of a training
- `penalties`: what each penalty on the weights is
- `penalty`: the penalty of a training: kind and strengths
- `network`: the Keras model
- `engine`: the compiled training loop
- `checkpoint`: the file from which a training resumes
"""
