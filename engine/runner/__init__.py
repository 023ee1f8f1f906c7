"""One rank's step: plan in, tensors through the model, sampled tokens out."""
