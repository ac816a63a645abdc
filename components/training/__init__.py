"""What the steps that train share.

- `params`: the parameters of a training
- `penalties`: what each penalty on the weights is
- `penalty`: the penalty of a training: kind and strengths
- `installed_networks`: the networks, by entry point
- `network`: the model of normalization and network; `network_check` tries it before it is trained
- `engine`: the compiled training loop
- `checkpoint`: the file from which a training resumes
"""
