"""What runs the operators: one folder a backend, in it one module an operator, each with the same four functions.

`unsupported(call)` says why not, from metadata alone; `configs(call)` lists what may be chosen, the default first;
`plan(call, config)` is all that follows from metadata alone, as a function of a call; `kernel_class(call, config)`
names the compiled kernel with every constant of it, or is None where nothing has to be checked. A fifth, `split(call)`,
is for backends that need several kernels for some calls. A folder says whether its backend is there (`unavailable`),
what it lacks (`lacks`), why it could not be imported (`IMPORT_ERROR`), and may say which exceptions mean that a kernel
does not fit a device (`UNFIT`).
"""

CONVOLUTIONS_ONLY = (
    "{name} serves eval mode without gradients only, BN behind a convolution: call model.eval() and torch.no_grad(), "
    "and pre-activation networks, whose BN comes first, with another backend"
)
