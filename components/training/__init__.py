"""What the steps that train share.

- `params`: the parameters of a training
- `penalty`: the penalties on the weights
- `installed_networks`: the networks, by entry point
- `network`: the model of normalization and network; `network_check` tries it before it is trained
- `engine`: the compiled training loop
- `checkpoint`: the file from which a training resumes
"""
