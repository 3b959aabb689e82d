"""The table "to reproduce another library": torch itself where it is installed, Keras and Optax by their formulas.

The classes named after Keras and Optax are written from those libraries' sources, statement by statement, so that they
share neither code nor the form of the formulas with onepass.
"""

import copy
import math

import numpy as np
import pytest

import onepass
from onepass import functional

STEPS = 30
SHAPE = (6, 11)


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="torch is not installed; its presets are compared where it is")
    before = torch.get_default_dtype()
    yield torch
    torch.set_default_dtype(before)


def start(dtype=np.float64):
    return np.random.default_rng(3).uniform(-2.0, 2.0, SHAPE).astype(dtype)


NOISE = np.random.default_rng(5).normal(size=(STEPS, *SHAPE)) * np.geomspace(0.05, 4.0, SHAPE[1])
NOISE[7::9] *= 5.0  # bursts: second moments fall after them, so that a running maximum matters


def gradient(p, t):
    """Of 0.4 p^2 plus noise: an error of one step feeds the next."""
    return (0.8 * p + NOISE[t - 1]).astype(p.dtype)


def assert_same(actual, expected, tolerance):
    """Relative to a parameter and to how far it has gone, whichever is larger."""
    moved = np.abs(np.asarray(expected, np.float64) - start())
    assert np.isfinite(expected).all()
    assert np.median(moved) > 1e-2, "the parameters hardly moved"
    assert moved.min() > 0.0
    error = np.abs(np.asarray(actual, np.float64) - expected) / np.maximum(np.abs(expected), moved)
    assert error.max() <= tolerance, f"relative error {error.max():.3g}"


# torch

DECAY = 0.1
COUPLED = {"weight_decay": DECAY}
DECOUPLED = {"weight_decay": DECAY, "decoupled_weight_decay": True}
OUTSIDE = {"lr_in_velocity": False}
RMS = {"rho": 0.99, **OUTSIDE}


# id: (torch optimizer, its arguments, onepass optimizer, its arguments)
TORCH = {
    "SGD": ("SGD", {"lr": 0.05}, onepass.SGD, {"lr": 0.05}),
    "SGD-decay": ("SGD", {"lr": 0.05, **COUPLED}, onepass.SGD, {"lr": 0.05, **COUPLED}),
    "SGD-maximize": ("SGD", {"lr": 0.02, "maximize": True}, onepass.SGD, {"lr": 0.02, "maximize": True}),
    "momentum": ("SGD", {"lr": 0.02, "momentum": 0.9}, onepass.Momentum, {"lr": 0.02, **OUTSIDE}),
    "momentum-constant-lr": ("SGD", {"lr": 0.02, "momentum": 0.9}, onepass.Momentum, {"lr": 0.02}),
    "momentum-decay": (
        "SGD",
        {"lr": 0.02, "momentum": 0.9, **COUPLED},
        onepass.Momentum,
        {"lr": 0.02, **OUTSIDE, **COUPLED},
    ),
    "momentum-maximize-decay": (
        "SGD",
        {"lr": 0.01, "momentum": 0.9, "maximize": True, **COUPLED},
        onepass.Momentum,
        {"lr": 0.01, "maximize": True, **OUTSIDE, **COUPLED},
    ),
    "dampening": (
        "SGD",
        {"lr": 0.02, "momentum": 0.8, "dampening": 0.3},
        onepass.Momentum,
        {"lr": 0.02, "momentum": 0.8, "dampening": 0.3, **OUTSIDE},
    ),
    "nesterov": ("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True}, onepass.NAG, {"lr": 0.02, **OUTSIDE}),
    "nesterov-constant-lr": ("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True}, onepass.NAG, {"lr": 0.02}),
    "nesterov-decay": (
        "SGD",
        {"lr": 0.02, "momentum": 0.7, "nesterov": True, **COUPLED},
        onepass.NAG,
        {"lr": 0.02, "momentum": 0.7, **OUTSIDE, **COUPLED},
    ),
    "Adagrad": ("Adagrad", {}, onepass.AdaGrad, {}),
    "Adagrad-lr": ("Adagrad", {"lr": 0.3}, onepass.AdaGrad, {"lr": 0.3}),
    "Adagrad-lr_decay": ("Adagrad", {"lr": 0.3, "lr_decay": 0.1}, onepass.AdaGrad, {"lr": 0.3, "lr_decay": 0.1}),
    "Adagrad-accumulator": (
        "Adagrad",
        {"lr": 0.3, "initial_accumulator_value": 0.5, "eps": 1e-3},
        onepass.AdaGrad,
        {"lr": 0.3, "initial_accumulator": 0.5, "eps": 1e-3},
    ),
    "Adagrad-decay": ("Adagrad", {"lr": 0.3, **COUPLED}, onepass.AdaGrad, {"lr": 0.3, **COUPLED}),
    "RMSprop": ("RMSprop", {}, onepass.RMSprop, RMS),
    "RMSprop-alpha": ("RMSprop", {"alpha": 0.9}, onepass.RMSprop, OUTSIDE),
    "RMSprop-momentum": ("RMSprop", {"momentum": 0.9}, onepass.RMSprop, {**RMS, "momentum": 0.9}),
    "RMSprop-centered": ("RMSprop", {"centered": True}, onepass.RMSprop, {**RMS, "centered": True}),
    "RMSprop-centered-momentum": (
        "RMSprop",
        {"centered": True, "momentum": 0.8, "eps": 1e-3, **COUPLED},
        onepass.RMSprop,
        {**RMS, "centered": True, "momentum": 0.8, "eps": 1e-3, **COUPLED},
    ),
    "RMSprop-maximize": ("RMSprop", {"maximize": True}, onepass.RMSprop, {**RMS, "maximize": True}),
    "Adam": ("Adam", {"lr": 0.02}, onepass.Adam, {"lr": 0.02}),
    "Adam-default": ("Adam", {}, onepass.Adam, {}),
    "Adam-betas": (
        "Adam",
        {"lr": 0.02, "betas": (0.7, 0.95), "eps": 1e-3},
        onepass.Adam,
        {"lr": 0.02, "betas": (0.7, 0.95), "eps": 1e-3},
    ),
    "Adam-decay": ("Adam", {"lr": 0.02, **COUPLED}, onepass.Adam, {"lr": 0.02, **COUPLED}),
    "Adam-maximize": (
        "Adam",
        {"lr": 0.02, "maximize": True, **COUPLED},
        onepass.Adam,
        {"lr": 0.02, "maximize": True, **COUPLED},
    ),
    "Adam-amsgrad": (
        "Adam",
        {"lr": 0.02, "betas": (0.9, 0.9), "amsgrad": True},
        onepass.Adam,
        {"lr": 0.02, "betas": (0.9, 0.9), "amsgrad": True},
    ),
    "AdamW": ("AdamW", {"lr": 0.02}, onepass.AdamW, {"lr": 0.02}),
    "AdamW-decay": ("AdamW", {"lr": 0.02, "weight_decay": 0.5}, onepass.AdamW, {"lr": 0.02, "weight_decay": 0.5}),
    "AdamW-amsgrad": (
        "AdamW",
        {"lr": 0.02, "betas": (0.9, 0.9), "amsgrad": True},
        onepass.AdamW,
        {"lr": 0.02, "betas": (0.9, 0.9), "amsgrad": True},
    ),
    "NAdam": ("NAdam", {}, onepass.Nadam, {}),
    "NAdam-options": (
        "NAdam",
        {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "momentum_decay": 0.5},
        onepass.Nadam,
        {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "momentum_decay": 0.5},
    ),
    "NAdam-decay": ("NAdam", COUPLED, onepass.Nadam, COUPLED),
    "NAdam-decoupled": ("NAdam", DECOUPLED, onepass.Nadam, DECOUPLED),
    "NAdam-maximize": ("NAdam", {"maximize": True}, onepass.Nadam, {"maximize": True}),
}


def torch_path(torch, name, options, dtype, lr=None):
    torch.set_default_dtype(torch.float64 if dtype == np.float64 else torch.float32)  # of NAdam's mu_product
    p = torch.from_numpy(start(dtype)).requires_grad_()
    opt = getattr(torch.optim, name)([p], **options)
    for t in range(1, STEPS + 1):
        if lr is not None:
            opt.param_groups[0]["lr"] = lr(t)
        p.grad = torch.from_numpy(gradient(p.detach().numpy(), t))
        opt.step()
    return p.detach().numpy()


def onepass_path(cls, options, dtype=np.float64):
    p = start(dtype)
    opt = cls(p, **options)
    for t in range(1, STEPS + 1):
        opt.step(gradient(p, t))
    assert p.dtype == dtype
    return p


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 3e-6)])
@pytest.mark.parametrize("case", TORCH)
def test_torch(torch, case, dtype, tolerance):
    name, theirs, cls, ours = TORCH[case]
    assert_same(onepass_path(cls, ours, dtype), torch_path(torch, name, theirs, dtype), tolerance)


CHANGING = {
    "momentum": ("SGD", {"momentum": 0.9}, onepass.Momentum, OUTSIDE),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}, onepass.NAG, OUTSIDE),
    "RMSprop-momentum": ("RMSprop", {"momentum": 0.9}, onepass.RMSprop, {**RMS, "momentum": 0.9}),
    "AdamW": ("AdamW", {}, onepass.AdamW, {}),
    "NAdam-decoupled": ("NAdam", DECOUPLED, onepass.Nadam, DECOUPLED),
}


@pytest.mark.parametrize("case", CHANGING)
def test_torch_under_a_changing_learning_rate(torch, case):
    name, theirs, cls, ours = CHANGING[case]

    def lr(t):
        return 0.02 * (1.0 + 0.9 * math.sin(t))

    expected = torch_path(torch, name, theirs, np.float64, lr)
    assert_same(onepass_path(cls, {**ours, "lr": lr}), expected, 1e-12)
    if not ours.get("lr_in_velocity", True):
        inside = onepass_path(cls, {**ours, "lr": lr, "lr_in_velocity": True})
        assert np.abs(inside - expected).max() > 1e-3, "where the rate stands must matter as soon as it changes"


CONSTANT = np.random.default_rng(0).uniform(0.01, 10.0, 4096).astype(np.float32)


@pytest.mark.parametrize(("rho", "steps", "first"), [(0.9, 200, (100, 200)), (0.99, 1400, (1000, 1400))])
def test_torch_centered_rmsprop_turns_nan_under_a_constant_gradient(torch, rho, steps, first):
    """What the clamp in ours is for; the step depends on the gradient and on how torch was compiled."""
    p = torch.zeros(CONSTANT.size, requires_grad=True)
    p.grad = torch.from_numpy(CONSTANT)
    opt = torch.optim.RMSprop([p], lr=1e-3, alpha=rho, centered=True)
    count = 0
    while count < steps and not torch.isnan(p).any():
        opt.step()
        count += 1
    assert torch.isnan(p).any()
    assert first[0] <= count <= first[1]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rho", [0.9, 0.99])
def test_centered_rmsprop_stays_finite_under_a_constant_gradient(rho, dtype, momentum):
    p = np.zeros(CONSTANT.size, dtype)
    g = CONSTANT.astype(dtype)
    opt = onepass.RMSprop(p, lr=1e-3, rho=rho, centered=True, momentum=momentum, lr_in_velocity=False)
    for _ in range(2000):
        opt.step(g)
    assert np.isfinite(p).all()
    assert (p < -1.0).all(), "every parameter goes down a constant slope"
    assert all(np.isfinite(array).all() for array in opt.state[0].values())


# torch tensors, in place


def memory_orders(torch, dtype):
    values = torch.arange(1.0, 61.0, dtype=dtype)
    return {
        "contiguous": values.clone().reshape(12, 5),
        "transposed": values.clone().reshape(5, 12).t(),
        "permuted": values.clone().reshape(3, 4, 5).permute(2, 0, 1),
        "channels_last": values.clone().reshape(1, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.0, dtype=dtype),
        "offset": torch.arange(0.0, 61.0, dtype=dtype)[1:],
    }


@pytest.mark.parametrize("order", ["contiguous", "transposed", "permuted", "channels_last", "scalar", "offset"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", ["tensor", "numpy"])
def test_torch_tensor_is_updated_in_place(torch, order, dtype, form):
    tensor = memory_orders(torch, getattr(torch, dtype))[order]
    pointer, strides = tensor.data_ptr(), tensor.stride()
    expected = tensor.numpy().copy()
    opt, ours = onepass.Adam(tensor, lr=0.1), onepass.Adam(expected, lr=0.1)
    before = tensor.clone()
    for t in range(1, 4):
        g = torch.sin(before * t)
        opt.step(g if form == "tensor" else g.numpy())
        ours.step(g.numpy().copy())
    assert (tensor.data_ptr(), tensor.stride()) == (pointer, strides)
    assert (tensor != before).all()
    np.testing.assert_array_equal(tensor.numpy(), expected)
    assert opt.param_groups[0]["params"][0] is tensor


def test_torch_gradient_with_gaps(torch):
    p, q = np.ones((4, 6)), np.ones((4, 6))
    g = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))[::2, 1::2]
    assert not g.is_contiguous()
    for array, grad in ((p, g), (q, g.numpy().copy())):
        opt = onepass.Momentum(array, lr=0.1)
        opt.step(grad)
        opt.step(grad)
    np.testing.assert_array_equal(p, q)
    assert (p != 1.0).all()


def test_torch_tensors_in_the_functional_form(torch):
    p, m, v = (torch.full((3, 7), x) for x in (1.0, 0.0, 0.0))
    pointers = [tensor.data_ptr() for tensor in (p, m, v)]
    g = torch.linspace(-1.0, 1.1, 21).reshape(7, 3).t()
    functional.adam([p], [g], [m], [v], step=1, lr=0.1)
    assert [tensor.data_ptr() for tensor in (p, m, v)] == pointers
    torch.testing.assert_close(p, 1.0 - 0.1 * torch.sign(g), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m, 0.1 * g)
    torch.testing.assert_close(v, 0.001 * g * g)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (lambda bad, good: bad, "params: "),
        (lambda bad, good: [good, bad], "params[1]: "),
        (lambda bad, good: {"bias": good, "fc.weight": bad}, "params[1] ('fc.weight'): "),
        (lambda bad, good: [{"params": [good, bad]}], "params[0]['params'][1]: "),
    ],
)
def test_torch_parameter_that_requires_grad(torch, params, name):
    bad, good = torch.ones(3, requires_grad=True), torch.ones(3)
    with pytest.raises(TypeError, match="require") as error:
        onepass.SGD(params(bad, good))
    assert str(error.value).startswith(name)
    assert torch.equal(bad.detach(), torch.ones(3))


def test_torch_gradient_that_requires_grad(torch):
    p = torch.ones(3)
    opt = onepass.Adam([p])
    with pytest.raises(TypeError, match=r"^grads\[0\]: .*require"):
        opt.step([torch.ones(3, requires_grad=True)])
    assert torch.equal(p, torch.ones(3))
    assert opt.step_counts == (0,)
    opt.step([torch.ones(3)])
    assert (p < 1.0).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda torch: torch.ones(4, dtype=torch.int64), TypeError, "dtype torch.int64 is not supported"),
        (lambda torch: torch.ones(4, dtype=torch.complex64), TypeError, "is not supported"),
        (lambda torch: torch.ones(8)[::2], ValueError, "dense"),
        (lambda torch: torch.ones(1).expand(4), ValueError, "dense"),
        (lambda torch: torch.ones(4, device="meta"), TypeError, "params"),
        (lambda torch: torch.ones(4).to_sparse(), TypeError, "params"),
    ],
    ids=["integer", "complex", "gaps", "expanded", "meta", "sparse"],
)
def test_torch_parameter_that_cannot_be_updated(torch, make, error, message):
    with pytest.raises(error, match=message) as raised:
        onepass.SGD([make(torch)])
    assert str(raised.value).startswith("params[0]: ")


def test_torch_module_learns_under_onepass(torch):
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    y = torch.sin(x.sum(dim=1, keepdim=True))
    net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    named = dict(net.named_parameters())
    opt = onepass.Adam({name: p.detach() for name, p in named.items()}, lr=0.02)
    losses = []
    for _ in range(150):
        net.zero_grad()
        loss = ((net(x) - y) ** 2).mean()
        loss.backward()
        opt.step({name: p.grad for name, p in named.items()})
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# Keras 3: keras/src/optimizers


class KerasSGD:
    def __init__(self, lr, momentum=0.0, nesterov=False):
        self.lr, self.momentum, self.nesterov, self.m = lr, momentum, nesterov, 0.0

    def update_step(self, variable, gradient, iterations):
        if self.momentum == 0.0:
            return variable - gradient * self.lr
        self.m = self.m * self.momentum - gradient * self.lr
        if self.nesterov:
            return variable + self.m * self.momentum - gradient * self.lr
        return variable + self.m


class KerasAdagrad:
    def __init__(self, lr, initial_accumulator_value=0.1, epsilon=1e-7):
        self.lr, self.accumulator, self.epsilon = lr, initial_accumulator_value, epsilon

    def update_step(self, variable, gradient, iterations):
        self.accumulator = self.accumulator + np.square(gradient)
        return variable - self.lr * gradient / np.sqrt(self.accumulator + self.epsilon)


class KerasRMSprop:
    def __init__(self, lr, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False):
        self.lr, self.rho, self.momentum, self.epsilon, self.centered = lr, rho, momentum, epsilon, centered
        self.velocity = self.average_gradient = self.m = 0.0

    def update_step(self, variable, gradient, iterations):
        self.velocity = self.rho * self.velocity + (1 - self.rho) * np.square(gradient)
        if self.centered:
            self.average_gradient = self.rho * self.average_gradient + (1 - self.rho) * gradient
            denominator = self.velocity - np.square(self.average_gradient) + self.epsilon
        else:
            denominator = self.velocity + self.epsilon
        increment = self.lr * gradient / np.sqrt(denominator)
        if self.momentum > 0:
            self.m = self.momentum * self.m + increment
            return variable - self.m
        return variable - increment


class KerasAdam:
    def __init__(self, lr, beta_1=0.9, beta_2=0.999, epsilon=1e-7, amsgrad=False):
        self.lr, self.beta_1, self.beta_2, self.epsilon, self.amsgrad = lr, beta_1, beta_2, epsilon, amsgrad
        self.m = self.v = self.v_hat = 0.0

    def update_step(self, variable, gradient, iterations):
        beta_1_power, beta_2_power = self.beta_1 ** (iterations + 1), self.beta_2 ** (iterations + 1)
        alpha = self.lr * np.sqrt(1 - beta_2_power) / (1 - beta_1_power)
        self.m = self.m + (gradient - self.m) * (1 - self.beta_1)
        self.v = self.v + (np.square(gradient) - self.v) * (1 - self.beta_2)
        v = self.v
        if self.amsgrad:
            v = self.v_hat = np.maximum(self.v_hat, self.v)
        return variable - self.m * alpha / (np.sqrt(v) + self.epsilon)


class KerasNadam:
    def __init__(self, lr=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
        self.lr, self.beta_1, self.beta_2, self.epsilon = lr, beta_1, beta_2, epsilon
        self.m = self.v = 0.0
        self.u_product = 1.0

    def update_step(self, variable, gradient, iterations):
        local_step, next_step = iterations + 1, iterations + 2
        u_t = self.beta_1 * (1.0 - 0.5 * 0.96**local_step)
        u_t_1 = self.beta_1 * (1.0 - 0.5 * 0.96**next_step)
        self.u_product = self.u_product * u_t
        u_product_t_1 = self.u_product * u_t_1
        self.m = self.m + (gradient - self.m) * (1 - self.beta_1)
        self.v = self.v + (np.square(gradient) - self.v) * (1 - self.beta_2)
        m_hat = u_t_1 * self.m / (1 - u_product_t_1) + (1 - u_t) * gradient / (1 - self.u_product)
        v_hat = self.v / (1 - self.beta_2**local_step)
        return variable - m_hat * self.lr / (np.sqrt(v_hat) + self.epsilon)


INSIDE = {"eps": 0.0, "eps_root": 1e-7}
HAT = {"eps_hat": True, "eps": 1e-7}

# id: (the Keras optimizer, onepass optimizer, its arguments)
KERAS = {
    "SGD": (KerasSGD(0.05), onepass.SGD, {"lr": 0.05}),
    "SGD-momentum": (KerasSGD(0.02, 0.9), onepass.Momentum, {"lr": 0.02}),
    "SGD-nesterov": (KerasSGD(0.02, 0.9, nesterov=True), onepass.NAG, {"lr": 0.02}),
    "Adagrad": (KerasAdagrad(0.1), onepass.AdaGrad, {"lr": 0.1, "initial_accumulator": 0.1, **INSIDE}),
    "RMSprop": (KerasRMSprop(0.01), onepass.RMSprop, {"rho": 0.9, **INSIDE}),
    "RMSprop-momentum": (KerasRMSprop(0.01, momentum=0.8), onepass.RMSprop, {"rho": 0.9, "momentum": 0.8, **INSIDE}),
    "RMSprop-centered": (
        KerasRMSprop(0.01, momentum=0.8, centered=True),
        onepass.RMSprop,
        {"rho": 0.9, "momentum": 0.8, "centered": True, **INSIDE},
    ),
    "Adam": (KerasAdam(0.02), onepass.Adam, {"lr": 0.02, **HAT}),
    "Adam-epsilon": (KerasAdam(0.02, epsilon=1e-2), onepass.Adam, {"lr": 0.02, **HAT, "eps": 1e-2}),
    "AMSGrad": (
        KerasAdam(0.02, 0.9, 0.9, amsgrad=True),
        onepass.Adam,
        {"lr": 0.02, "betas": (0.9, 0.9), "amsgrad": True, **HAT},
    ),
    "Nadam": (KerasNadam(), onepass.Nadam, {"momentum_decay": 1.0, "eps": 1e-7, "lr": 1e-3}),
    "Nadam-lr": (
        KerasNadam(0.02, 0.8),
        onepass.Nadam,
        {"momentum_decay": 1.0, "eps": 1e-7, "lr": 0.02, "betas": (0.8, 0.999)},
    ),
}


@pytest.mark.parametrize("decay", [0.0, 0.3], ids=["", "decay"])
@pytest.mark.parametrize("case", KERAS)
def test_keras(case, decay):
    keras, cls, options = KERAS[case]
    keras, variable = copy.deepcopy(keras), start()
    for iterations in range(STEPS):
        g = gradient(variable, iterations + 1)
        variable = variable - variable * decay * keras.lr  # base_optimizer._apply_weight_decay, before the step
        variable = keras.update_step(variable, g, iterations)
    ours = onepass_path(cls, {**options, "weight_decay": decay, "decoupled_weight_decay": True})
    assert_same(ours, variable, 1e-12)


# Optax: optax/_src/transform.py and alias.py. Each gives the updates; scale_by_learning_rate multiplies by -lr.


class OptaxAdam:
    def __init__(self, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=False):
        self.b1, self.b2, self.eps, self.eps_root, self.nesterov = b1, b2, eps, eps_root, nesterov
        self.mu = self.nu = 0.0

    def update(self, updates, count_inc):
        self.mu = (1 - self.b1) * updates + self.b1 * self.mu
        self.nu = (1 - self.b2) * updates**2 + self.b2 * self.nu
        if self.nesterov:
            mu_hat = self.b1 * self.mu / (1 - self.b1 ** (count_inc + 1)) + (1 - self.b1) * updates / (
                1 - self.b1**count_inc
            )
        else:
            mu_hat = self.mu / (1 - self.b1**count_inc)
        nu_hat = self.nu / (1 - self.b2**count_inc)
        return mu_hat / (np.sqrt(nu_hat + self.eps_root) + self.eps)


class OptaxAmsgrad(OptaxAdam):
    nu_max = 0.0

    def update(self, updates, count_inc):
        self.mu = (1 - self.b1) * updates + self.b1 * self.mu
        self.nu = (1 - self.b2) * updates**2 + self.b2 * self.nu
        mu_hat, nu_hat = self.mu / (1 - self.b1**count_inc), self.nu / (1 - self.b2**count_inc)
        self.nu_max = np.maximum(self.nu_max, nu_hat)
        return mu_hat / (np.sqrt(self.nu_max + self.eps_root) + self.eps)


class OptaxRss:
    def __init__(self, initial_accumulator_value=0.1, eps=1e-7):
        self.sum_of_squares, self.eps = initial_accumulator_value, eps

    def update(self, updates, count_inc):
        self.sum_of_squares = updates**2 + self.sum_of_squares
        return np.where(self.sum_of_squares > 0, 1 / np.sqrt(self.sum_of_squares + self.eps), 0.0) * updates


class OptaxRms:
    def __init__(self, decay=0.9, eps=1e-8, centered=False):
        self.decay, self.eps, self.centered, self.mu, self.nu = decay, eps, centered, 0.0, 0.0

    def update(self, updates, count_inc):
        self.nu = (1 - self.decay) * updates**2 + self.decay * self.nu
        variance = self.nu
        if self.centered:
            self.mu = (1 - self.decay) * updates + self.decay * self.mu
            variance = self.nu - self.mu**2
        return updates / np.sqrt(variance + self.eps)


class OptaxTrace:
    """chain(inner, scale_by_learning_rate, trace): rmsprop with momentum accumulates what the rate has scaled."""

    def __init__(self, inner, decay):
        self.inner, self.decay, self.trace = inner, decay, 0.0

    def update(self, updates, count_inc):
        self.trace = self.inner.update(updates, count_inc) + self.decay * self.trace
        return self.trace


# id: (transformation, learning rate, weight decay, onepass optimizer, its arguments)
OPTAX = {
    "adam": (OptaxAdam(), 0.02, 0.0, onepass.Adam, {}),
    "adam-eps_root": (OptaxAdam(eps=1e-3, eps_root=1e-3), 0.02, 0.0, onepass.Adam, {"eps": 1e-3, "eps_root": 1e-3}),
    "adamw": (OptaxAdam(), 0.02, 1e-2, onepass.AdamW, {}),
    "adamw-decay": (OptaxAdam(), 0.02, 0.4, onepass.AdamW, {"weight_decay": 0.4}),
    "amsgrad": (OptaxAmsgrad(), 0.02, 0.0, onepass.Adam, {"amsgrad": True, "max_of_corrected": True}),
    "amsgrad-b2": (
        OptaxAmsgrad(b2=0.9),
        0.02,
        0.0,
        onepass.Adam,
        {"betas": (0.9, 0.9), "amsgrad": True, "max_of_corrected": True},
    ),
    "adagrad": (OptaxRss(), 0.1, 0.0, onepass.AdaGrad, {"initial_accumulator": 0.1, **INSIDE}),
    "rmsprop": (OptaxRms(), 0.01, 0.0, onepass.RMSprop, {"eps": 0.0, "eps_root": 1e-8, "rho": 0.9}),
    "rmsprop-centered": (
        OptaxRms(eps=1e-4, centered=True),
        0.01,
        0.0,
        onepass.RMSprop,
        {"eps": 0.0, "eps_root": 1e-4, "rho": 0.9, "centered": True},
    ),
    "rmsprop-momentum": (
        OptaxTrace(OptaxRms(), 0.8),
        0.01,
        0.0,
        onepass.RMSprop,
        {"eps": 0.0, "eps_root": 1e-8, "rho": 0.9, "momentum": 0.8},
    ),
    "nadam": (OptaxAdam(nesterov=True), 0.02, 0.0, onepass.Nadam, {"momentum_decay": math.inf}),
    "nadamw": (
        OptaxAdam(nesterov=True),
        0.02,
        0.4,
        onepass.Nadam,
        {"momentum_decay": math.inf, "weight_decay": 0.4, "decoupled_weight_decay": True},
    ),
}


@pytest.mark.parametrize("case", OPTAX)
def test_optax(case):
    transformation, lr, decay, cls, options = copy.deepcopy(OPTAX[case])
    params = start()
    for count_inc in range(1, STEPS + 1):
        updates = transformation.update(gradient(params, count_inc), count_inc)
        params = params + -lr * (updates + decay * params)  # add_decayed_weights, scale_by_learning_rate
    assert_same(onepass_path(cls, {"lr": lr, **options}), params, 1e-12)


# The forms of the lecture slides


def slides_adagrad(g, t, s):
    s["r"] = s.get("r", 0.0) + g * g
    return 0.1 / np.sqrt(s["r"] + 1e-6) * g


def slides_rmsprop(g, t, s):
    s["r"] = 0.9 * s.get("r", 0.0) + 0.1 * g * g
    return 0.01 / np.sqrt(s["r"] + 1e-6) * g


def slides_adam(g, t, s):
    s["m"], s["v"] = 0.9 * s.get("m", 0.0) + 0.1 * g, 0.999 * s.get("v", 0.0) + 0.001 * g * g
    return 0.02 / np.sqrt(s["v"] / (1 - 0.999**t) + 1e-6) * (s["m"] / (1 - 0.9**t))


def slides_adam_uncorrected(g, t, s):
    s["m"], s["v"] = 0.9 * s.get("m", 0.0) + 0.1 * g, 0.999 * s.get("v", 0.0) + 0.001 * g * g
    return 0.005 / np.sqrt(s["v"] + 1e-6) * s["m"]


def slides_amsgrad(g, t, s):
    s["m"], s["v"] = 0.9 * s.get("m", 0.0) + 0.1 * g, 0.9 * s.get("v", 0.0) + 0.1 * g * g
    s["w"] = np.maximum(s.get("w", 0.0), s["v"])
    return 0.02 / np.sqrt(s["w"] + 1e-6) * s["m"]


ROOT = {"eps": 0, "eps_root": 1e-6}
SLIDES = {
    "AdaGrad": (slides_adagrad, onepass.AdaGrad, {"lr": 0.1, **ROOT}),
    "RMSprop": (slides_rmsprop, onepass.RMSprop, {"lr": 0.01, **ROOT}),
    "Adam": (slides_adam, onepass.Adam, {"lr": 0.02, **ROOT}),
    "Adam before the correction": (
        slides_adam_uncorrected,
        onepass.Adam,
        {"lr": 0.005, "bias_correction": False, **ROOT},
    ),
    "AMSGrad": (slides_amsgrad, onepass.AMSGrad, {"lr": 0.02, "betas": (0.9, 0.9), **ROOT}),
}


@pytest.mark.parametrize("case", SLIDES)
def test_lecture_slides(case):
    step, cls, options = SLIDES[case]
    w, state = start(), {}
    for t in range(1, STEPS + 1):
        w = w - step(gradient(w, t), t, state)
    assert_same(onepass_path(cls, options), w, 1e-12)
