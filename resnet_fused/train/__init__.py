"""Training: the papers' recipes on CIFAR-10 and ImageNet's layout, in one process or several."""
