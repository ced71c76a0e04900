"""The learned optimizer: features, update rule, `HRNN`, kernels, pretrained weights. Needs torch alone."""
