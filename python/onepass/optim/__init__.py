"""The optimizers: hyper-parameters, step counts and recipes in Python, arithmetic in the kernels."""

from onepass.optim.adagrad import AdaGrad
from onepass.optim.adam import Adam
from onepass.optim.adamw import AdamW
from onepass.optim.adasqrt import AdaSqrt
from onepass.optim.amsgrad import AMSGrad
from onepass.optim.hyper import ParamGroup
from onepass.optim.momentum import Momentum
from onepass.optim.nadam import Nadam
from onepass.optim.nag import NAG
from onepass.optim.optimizer import Optimizer
from onepass.optim.rmsprop import RMSprop
from onepass.optim.sgd import SGD

__all__ = [
    "NAG",
    "SGD",
    "AMSGrad",
    "AdaGrad",
    "AdaSqrt",
    "Adam",
    "AdamW",
    "Momentum",
    "Nadam",
    "Optimizer",
    "ParamGroup",
    "RMSprop",
]
