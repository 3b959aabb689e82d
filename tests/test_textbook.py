"""Every optimizer against its formula as the papers print it, in float64, with errors left to compound.

Each method below is written from its source alone, in the symbols of that source, and knows nothing of rules, recipes
or coefficients. The gradient is the one of a coupled, noisy test function at the method's own iterate, so an error of
one step feeds the next.
"""

import math

import numpy as np
import pytest

import onepass
from onepass import schedules

STEPS = 50
SHAPE = (5, 9)  # 45 elements: full vectors of every width and a tail
TOLERANCE = 1e-13


def start():
    return np.random.default_rng(7).uniform(-2.0, 2.0, SHAPE)


class TestFunction:
    """Noisy gradients of 0.5 x'Ax + 0.05 sum(x^4) - b'x, whose rows differ in scale by a factor of 50."""

    __test__ = False

    def __init__(self):
        rng = np.random.default_rng(11)
        size = math.prod(SHAPE)
        root = rng.normal(size=(size, size)) / math.sqrt(size)
        self.scale = np.geomspace(0.1, 5.0, size)
        self.hessian = 0.5 * root @ root.T + np.diag(np.linspace(0.1, 0.6, size))
        self.shift = rng.normal(size=size)
        # Bursts that decay, so that running second moments fall as well as rise.
        self.noise = rng.normal(size=(STEPS, size)) * (0.3 + 2.0 * (np.arange(STEPS) % 13 == 2))[:, None]

    def __call__(self, x, t):
        flat = x.ravel()
        g = self.hessian @ flat + 0.2 * flat**3 - self.shift + self.noise[t - 1]
        return (self.scale * g).reshape(SHAPE)


GRADIENT = TestFunction()


def rate(lr, t):
    return lr(t) if callable(lr) else lr


# Methods: an object with step(g, t), the change that is subtracted from the weights, and lr.


class GradientDescent:
    """Robbins and Monro (1951): x_{t+1} = x_t - a_t y_t."""

    def __init__(self, lr):
        self.lr = lr

    def step(self, g, t):
        return rate(self.lr, t) * g


class HeavyBall:
    """Polyak (1964) as Sutskever et al. (2013), eq. 1, 2 write it, v with the opposite sign: v = mu v + eps g."""

    def __init__(self, lr, mu, dampening=0.0):
        self.lr, self.mu, self.dampening, self.v = lr, mu, dampening, None

    def step(self, g, t):
        eta = rate(self.lr, t)
        self.v = eta * g if self.v is None else self.mu * self.v + eta * (1 - self.dampening) * g
        return self.v


class HeavyBallOfGradients:
    """As the torch documentation of SGD prints it: b_1 = g_1, b_t = mu b + (1 - tau) g, x = x - gamma b."""

    def __init__(self, lr, mu, dampening=0.0):
        self.lr, self.mu, self.dampening, self.b = lr, mu, dampening, None

    def step(self, g, t):
        self.b = g if self.b is None else self.mu * self.b + (1 - self.dampening) * g
        return rate(self.lr, t) * self.b


class NesterovOfGradients:
    """As the torch documentation of SGD prints it: b_t = mu b + g, g_t = g + mu b_t, x = x - gamma g_t."""

    def __init__(self, lr, mu):
        self.lr, self.mu, self.b = lr, mu, 0.0

    def step(self, g, t):
        self.b = self.mu * self.b + g
        return rate(self.lr, t) * (g + self.mu * self.b)


class DiagonalAdaGrad:
    """Duchi et al. (2011), eq. 1 with the diagonal of G_t; the sum is kept term by term."""

    def __init__(self, lr, delta=0.0, inside=0.0, first=0.0, lr_decay=0.0):
        self.lr, self.delta, self.inside, self.first, self.lr_decay = lr, delta, inside, first, lr_decay
        self.gradients = []

    def step(self, g, t):
        self.gradients.append(g)
        total = self.first + sum(past**2 for past in self.gradients)
        eta = rate(self.lr, t) / (1 + (t - 1) * self.lr_decay)
        return eta * (g / (self.delta + np.sqrt(total + self.inside)))


class SquareFreeAdaGrad:
    """AdaSqrt, Hu, Lin and Tang (2019), algorithm 1: S_t = S + g^2, x = x - lr sqrt(t) g / (S_t + eps)."""

    def __init__(self, lr, eps):
        self.lr, self.eps, self.s = lr, eps, 0.0

    def step(self, g, t):
        self.s = self.s + g**2
        return rate(self.lr, t) * t**0.5 * (g / (self.s + self.eps))


class HintonRMSprop:
    """Hinton (2012), lecture 6e: MeanSquare = rho MeanSquare + (1 - rho) g^2; divide g by its root."""

    def __init__(self, lr, rho, outside=0.0, inside=0.0):
        self.lr, self.rho, self.outside, self.inside, self.mean_square = lr, rho, outside, inside, 0.0

    def denominator(self, g):
        self.mean_square = self.rho * self.mean_square + (1 - self.rho) * g**2
        return np.sqrt(self.mean_square + self.inside) + self.outside

    def step(self, g, t):
        return rate(self.lr, t) * (g / self.denominator(g))


class GravesRMSprop(HintonRMSprop):
    """Graves (2013), eq. 38-45: n = aleph n + (1 - aleph) e^2, g = aleph g + (1 - aleph) e, root of n - g^2 + eps."""

    mean = 0.0

    def denominator(self, g):
        n = self.mean_square = self.rho * self.mean_square + (1 - self.rho) * g**2
        self.mean = self.rho * self.mean + (1 - self.rho) * g
        variance = n - self.mean**2
        assert variance.min() > 0.0, "the test function must not need the clamp"
        return np.sqrt(variance + self.inside) + self.outside


class WithStepMomentum:
    """Graves (2013), eq. 42: Delta = beth Delta - daleth e / root; the steps are accumulated."""

    def __init__(self, divided, mu):
        self.divided, self.lr, self.mu, self.delta = divided, divided.lr, mu, 0.0

    def step(self, g, t):
        self.delta = self.mu * self.delta + self.divided.step(g, t)
        return self.delta


class WithDirectionMomentum:
    """As the torch documentation of RMSprop prints it: b = mu b + g / root, x = x - gamma b."""

    def __init__(self, divided, mu):
        self.divided, self.lr, self.mu, self.b = divided, divided.lr, mu, 0.0

    def step(self, g, t):
        self.b = self.mu * self.b + g / self.divided.denominator(g)
        return rate(self.lr, t) * self.b


class KingmaBa:
    """Kingma and Ba (2015), algorithm 1."""

    def __init__(self, lr, betas, eps=0.0, inside=0.0):
        self.lr, (self.beta1, self.beta2), self.eps, self.inside = lr, betas, eps, inside
        self.m = self.v = 0.0

    def moments(self, g):
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g * g

    def step(self, g, t):
        self.moments(g)
        m_hat = self.m / (1 - self.beta1**t)
        v_hat = self.v / (1 - self.beta2**t)
        return rate(self.lr, t) * m_hat / (np.sqrt(v_hat + self.inside) + self.eps)


class KingmaBaEpsilonHat(KingmaBa):
    """Kingma and Ba (2015), end of section 2: alpha_t m / (sqrt(v) + eps^)."""

    def step(self, g, t):
        self.moments(g)
        alpha = rate(self.lr, t) * math.sqrt(1 - self.beta2**t) / (1 - self.beta1**t)
        return alpha * self.m / (np.sqrt(self.v) + self.eps)


class Uncorrected(KingmaBa):
    """Adam before its bias correction."""

    def step(self, g, t):
        self.moments(g)
        return rate(self.lr, t) * self.m / (np.sqrt(self.v + self.inside) + self.eps)


class Reddi(KingmaBa):
    """Reddi et al. (2018), algorithm 2: v^ = max(v^, v), x - alpha m / sqrt(v^)."""

    largest = 0.0

    def step(self, g, t):
        self.moments(g)
        self.largest = np.maximum(self.largest, self.v)
        return rate(self.lr, t) * self.m / (np.sqrt(self.largest + self.inside) + self.eps)


class ReddiCorrected(Reddi):
    """As the torch documentation of Adam prints it: the maximum first, the correction after it."""

    def step(self, g, t):
        self.moments(g)
        self.largest = np.maximum(self.largest, self.v)
        m_hat, v_hat = self.m / (1 - self.beta1**t), self.largest / (1 - self.beta2**t)
        return rate(self.lr, t) * m_hat / (np.sqrt(v_hat + self.inside) + self.eps)


class ReddiOfCorrected(Reddi):
    """As Optax has it: the maximum of the corrected second moments."""

    def step(self, g, t):
        self.moments(g)
        m_hat, v_hat = self.m / (1 - self.beta1**t), self.v / (1 - self.beta2**t)
        self.largest = np.maximum(self.largest, v_hat)
        return rate(self.lr, t) * m_hat / (np.sqrt(self.largest + self.inside) + self.eps)


class Dozat(KingmaBa):
    """Dozat (2016), algorithm 2 with the schedule mu(t) and the product of all momenta, as a product.

    Without the factor beta2 (it calls it nu) before v_hat, which no implementation has.
    """

    def __init__(self, lr, betas, eps=0.0, inside=0.0, mu=None):
        super().__init__(lr, betas, eps, inside)
        self.mu = mu or (lambda t: self.beta1)

    def step(self, g, t):
        self.moments(g)
        past = math.prod(self.mu(i) for i in range(1, t + 1))
        g_hat = g / (1 - past)
        m_hat = self.m / (1 - past * self.mu(t + 1))
        m_bar = (1 - self.mu(t)) * g_hat + self.mu(t + 1) * m_hat
        v_hat = self.v / (1 - self.beta2**t)
        return rate(self.lr, t) * m_bar / (np.sqrt(v_hat + self.inside) + self.eps)


def warming(beta1, psi):
    return lambda t: beta1 * (1 - 0.5 * 0.96 ** (t * psi))


BETAS = (0.8, 0.95)


def case(method, cls, lr, **options):
    """A method of lr, the optimizer that claims to be it, a learning rate that moves, and the optimizer's options."""
    return method, cls, lr, options


METHODS = {
    "sgd": case(GradientDescent, onepass.SGD, 0.05),
    "momentum": case(lambda lr: HeavyBall(lr, 0.9), onepass.Momentum, 0.01),
    "momentum-mu": case(lambda lr: HeavyBall(lr, 0.5), onepass.Momentum, 0.03, momentum=0.5),
    "momentum-0": case(lambda lr: HeavyBall(lr, 0.0), onepass.Momentum, 0.05, momentum=0.0),
    "momentum-dampening": case(lambda lr: HeavyBall(lr, 0.9, 0.3), onepass.Momentum, 0.02, dampening=0.3),
    "momentum-outside": case(
        lambda lr: HeavyBallOfGradients(lr, 0.8), onepass.Momentum, 0.01, momentum=0.8, lr_in_velocity=False
    ),
    "momentum-outside-dampening": case(
        lambda lr: HeavyBallOfGradients(lr, 0.9, 0.4), onepass.Momentum, 0.02, dampening=0.4, lr_in_velocity=False
    ),
    "nag-outside": case(lambda lr: NesterovOfGradients(lr, 0.8), onepass.NAG, 0.01, momentum=0.8, lr_in_velocity=False),
    "adagrad": case(lambda lr: DiagonalAdaGrad(lr, 1e-10), onepass.AdaGrad, 0.3),
    "adagrad-eps": case(lambda lr: DiagonalAdaGrad(lr, 1e-2), onepass.AdaGrad, 0.3, eps=1e-2),
    "adagrad-eps_root": case(lambda lr: DiagonalAdaGrad(lr, inside=1e-2), onepass.AdaGrad, 0.3, eps=0.0, eps_root=1e-2),
    "adagrad-both_eps": case(lambda lr: DiagonalAdaGrad(lr, 3e-2, 2e-2), onepass.AdaGrad, 0.3, eps=3e-2, eps_root=2e-2),
    "adagrad-initial_accumulator": case(
        lambda lr: DiagonalAdaGrad(lr, 1e-10, first=0.1), onepass.AdaGrad, 0.3, initial_accumulator=0.1
    ),
    "adagrad-lr_decay": case(lambda lr: DiagonalAdaGrad(lr, 1e-10, lr_decay=0.05), onepass.AdaGrad, 0.4, lr_decay=0.05),
    "adasqrt": case(lambda lr: SquareFreeAdaGrad(lr, 1e-8), onepass.AdaSqrt, 0.02),
    "adasqrt-eps": case(lambda lr: SquareFreeAdaGrad(lr, 1e-2), onepass.AdaSqrt, 0.05, eps=1e-2),
    "rmsprop": case(lambda lr: HintonRMSprop(lr, 0.9, 1e-8), onepass.RMSprop, 0.01),
    "rmsprop-rho": case(lambda lr: HintonRMSprop(lr, 0.99, 1e-8), onepass.RMSprop, 0.01, rho=0.99),
    "rmsprop-eps": case(lambda lr: HintonRMSprop(lr, 0.9, 1e-2), onepass.RMSprop, 0.01, eps=1e-2),
    "rmsprop-eps_root": case(
        lambda lr: HintonRMSprop(lr, 0.9, inside=1e-2), onepass.RMSprop, 0.01, eps=0.0, eps_root=1e-2
    ),
    "rmsprop-centered": case(
        lambda lr: GravesRMSprop(lr, 0.95, inside=1e-4),
        onepass.RMSprop,
        0.01,
        rho=0.95,
        eps=0.0,
        eps_root=1e-4,
        centered=True,
    ),
    "rmsprop-centered-eps": case(
        lambda lr: GravesRMSprop(lr, 0.9, 1e-3), onepass.RMSprop, 0.01, eps=1e-3, centered=True
    ),
    "rmsprop-momentum": case(
        lambda lr: WithStepMomentum(HintonRMSprop(lr, 0.9, 1e-3), 0.7), onepass.RMSprop, 0.01, eps=1e-3, momentum=0.7
    ),
    "rmsprop-momentum-outside": case(
        lambda lr: WithDirectionMomentum(HintonRMSprop(lr, 0.9, 1e-3), 0.8),
        onepass.RMSprop,
        0.01,
        eps=1e-3,
        momentum=0.8,
        lr_in_velocity=False,
    ),
    "rmsprop-graves": case(
        lambda lr: WithStepMomentum(GravesRMSprop(lr, 0.95, inside=1e-4), 0.9),
        onepass.RMSprop,
        0.003,
        rho=0.95,
        eps=0.0,
        eps_root=1e-4,
        momentum=0.9,
        centered=True,
    ),
    "rmsprop-centered-momentum-outside": case(
        lambda lr: WithDirectionMomentum(GravesRMSprop(lr, 0.95, 1e-3), 0.8),
        onepass.RMSprop,
        0.003,
        rho=0.95,
        eps=1e-3,
        momentum=0.8,
        centered=True,
        lr_in_velocity=False,
    ),
    "adam": case(lambda lr: KingmaBa(lr, (0.9, 0.999), 1e-8), onepass.Adam, 0.02),
    "adam-betas": case(lambda lr: KingmaBa(lr, BETAS, 1e-8), onepass.Adam, 0.02, betas=BETAS),
    "adam-beta1_0": case(lambda lr: KingmaBa(lr, (0.0, 0.9), 1e-8), onepass.Adam, 0.01, betas=(0.0, 0.9)),
    "adam-eps": case(lambda lr: KingmaBa(lr, BETAS, 1e-2), onepass.Adam, 0.02, betas=BETAS, eps=1e-2),
    "adam-eps_root": case(
        lambda lr: KingmaBa(lr, BETAS, inside=1e-2), onepass.Adam, 0.02, betas=BETAS, eps=0.0, eps_root=1e-2
    ),
    "adam-eps_hat": case(
        lambda lr: KingmaBaEpsilonHat(lr, BETAS, 1e-2), onepass.Adam, 0.02, betas=BETAS, eps=1e-2, eps_hat=True
    ),
    "adam-uncorrected": case(
        lambda lr: Uncorrected(lr, BETAS, 1e-3, 1e-4),
        onepass.Adam,
        0.02,
        betas=BETAS,
        eps=1e-3,
        eps_root=1e-4,
        bias_correction=False,
    ),
    "adam-amsgrad": case(lambda lr: ReddiCorrected(lr, BETAS, 1e-8), onepass.Adam, 0.03, betas=BETAS, amsgrad=True),
    "adam-max_of_corrected": case(
        lambda lr: ReddiOfCorrected(lr, BETAS, 1e-8, 1e-4),
        onepass.Adam,
        0.03,
        betas=BETAS,
        eps_root=1e-4,
        amsgrad=True,
        max_of_corrected=True,
    ),
    "adam-amsgrad-uncorrected": case(
        lambda lr: Reddi(lr, BETAS, 1e-3),
        onepass.Adam,
        0.03,
        betas=BETAS,
        eps=1e-3,
        amsgrad=True,
        bias_correction=False,
    ),
    "amsgrad": case(lambda lr: Reddi(lr, BETAS, 1e-8), onepass.AMSGrad, 0.03, betas=BETAS),
    "amsgrad-eps_root": case(
        lambda lr: Reddi(lr, BETAS, inside=1e-2), onepass.AMSGrad, 0.03, betas=BETAS, eps=0.0, eps_root=1e-2
    ),
    "amsgrad-corrected": case(
        lambda lr: ReddiCorrected(lr, (0.9, 0.97), 1e-3),
        onepass.AMSGrad,
        0.03,
        betas=(0.9, 0.97),
        eps=1e-3,
        bias_correction=True,
    ),
    "nadam": case(lambda lr: Dozat(lr, (0.9, 0.999), 1e-8, mu=warming(0.9, 0.004)), onepass.Nadam, 0.02),
    "nadam-keras": case(
        lambda lr: Dozat(lr, BETAS, 1e-3, mu=warming(0.8, 1.0)),
        onepass.Nadam,
        0.02,
        betas=BETAS,
        eps=1e-3,
        momentum_decay=1.0,
    ),
    "nadam-unscheduled": case(
        lambda lr: Dozat(lr, BETAS, 1e-8), onepass.Nadam, 0.02, betas=BETAS, momentum_decay=math.inf
    ),
    "nadam-unwarmed": case(
        lambda lr: Dozat(lr, BETAS, 1e-8, mu=lambda t: 0.4), onepass.Nadam, 0.02, betas=BETAS, momentum_decay=0
    ),
    "nadam-eps_root": case(
        lambda lr: Dozat(lr, BETAS, inside=1e-2, mu=warming(0.8, 0.1)),
        onepass.Nadam,
        0.02,
        betas=BETAS,
        eps=0.0,
        eps_root=1e-2,
        momentum_decay=0.1,
    ),
}

DECAY, L1 = 0.3, 0.02

# id: (options of the optimizer, the gradient of what is minimized, lambda of the decoupled decay)
SURROUNDINGS = {
    "plain": ({}, lambda g, x: g, 0.0),
    "coupled": ({"weight_decay": DECAY}, lambda g, x: g + DECAY * x, 0.0),
    "decoupled": ({"weight_decay": DECAY, "decoupled_weight_decay": True}, lambda g, x: g, DECAY),
    "l1": ({"l1": L1}, lambda g, x: g + L1 * np.sign(x), 0.0),
    "elastic": ({"l1": L1, "weight_decay": DECAY}, lambda g, x: g + L1 * np.sign(x) + DECAY * x, 0.0),
    "maximize": ({"maximize": True}, lambda g, x: -g, 0.0),
    "maximize-elastic": (
        {"maximize": True, "l1": L1, "weight_decay": DECAY},
        lambda g, x: -g + L1 * np.sign(x) + DECAY * x,
        0.0,
    ),
    "l1-decoupled": (
        {"l1": L1, "weight_decay": DECAY, "decoupled_weight_decay": True},
        lambda g, x: g + L1 * np.sign(x),
        DECAY,
    ),
}


def textbook_path(method, surrounding="plain"):
    """The iterates of a method, decoupled decay as in Loshchilov and Hutter (2019), algorithm 2."""
    _, objective, decay = SURROUNDINGS[surrounding]
    sign = -1.0 if surrounding.startswith("maximize") else 1.0  # of the gradient the optimizer is handed
    x, path = start(), []
    for t in range(1, STEPS + 1):
        g = objective(sign * GRADIENT(x, t), x)
        x = x - method.step(g, t) - rate(method.lr, t) * decay * x
        path.append(x)
    return np.array(path)


def onepass_path(optimizer, p, sign=1.0, read=None):
    path = []
    for t in range(1, STEPS + 1):
        optimizer.step(sign * GRADIENT(p, t))
        path.append(p.copy() if read is None else read())
    return np.array(path)


def assert_same_path(actual, expected):
    travelled = np.abs(np.diff(expected, axis=0, prepend=start()[None])).sum(axis=0)
    assert np.isfinite(expected).all()
    assert travelled.min() > 1e-2, "a parameter hardly moved"
    assert np.median(np.abs(expected[-1] - start())) > 0.05, "the parameters hardly moved"
    allowed = TOLERANCE * np.maximum(np.abs(expected), np.abs(expected - start()))
    wrong = ~(np.abs(actual - expected) <= allowed)
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} differ, first at step {np.argwhere(wrong)[0][0] + 1}, at worst by "
        f"{np.nanmax(np.abs(actual - expected) / allowed) * TOLERANCE:.3g} relative"
    )


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("name", METHODS)
def test_optimizer_follows_the_textbook(name, surrounding):
    method, cls, lr, options = METHODS[name]
    extra = SURROUNDINGS[surrounding][0]
    p = start()
    optimizer = cls(p, lr=lr, **options, **extra)
    actual = onepass_path(optimizer, p, -1.0 if extra.get("maximize") else 1.0)
    assert_same_path(actual, textbook_path(method(lr), surrounding))


SCHEDULES = {
    "inverse_time": schedules.inverse_time(1.5, decay=0.1),
    "warmup_cosine": schedules.linear_warmup(schedules.cosine(2.0, steps=STEPS, final=0.1), steps=5),
    "lambda": lambda t: 1.0 + 0.5 * math.sin(t),
}


@pytest.mark.parametrize("surrounding", ["plain", "decoupled"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", METHODS)
def test_learning_rate_changes_by_schedule(name, schedule, surrounding):
    method, cls, base, options = METHODS[name]

    def lr(t):
        return base * SCHEDULES[schedule](t)

    p = start()
    optimizer = cls(p, lr=lr, **options, **SURROUNDINGS[surrounding][0])
    assert_same_path(onepass_path(optimizer, p), textbook_path(method(lr), surrounding))


@pytest.mark.parametrize("name", METHODS)
def test_learning_rate_assigned_between_steps_is_the_scheduled_one(name):
    method, cls, base, options = METHODS[name]

    def lr(t):
        return base / (1 + t % 3)

    p = start()
    optimizer = cls(p, **options)
    path = []
    for t in range(1, STEPS + 1):
        optimizer.lr = lr(t)
        optimizer.step(GRADIENT(p, t))
        path.append(p.copy())
    assert_same_path(np.array(path), textbook_path(method(lr)))


def lookahead_path(lr, mu, objective=lambda g, w: g, sign=1.0):
    """Sutskever et al. (2013), eq. 3, 4, v with the opposite sign: the gradient is evaluated at w - mu v."""
    w, v, path = start(), np.zeros(SHAPE), []
    for t in range(1, STEPS + 1):
        ahead = w - mu * v
        v = mu * v + rate(lr, t) * objective(sign * GRADIENT(ahead, t), ahead)
        w = w - v
        path.append((w, w - mu * v))
    return np.array(path)


@pytest.mark.parametrize("surrounding", ["plain", "coupled", "elastic", "maximize", "maximize-elastic"])
@pytest.mark.parametrize(
    "lr",
    [0.01, lambda t: 0.03 / (1 + 0.1 * t), schedules.cosine(0.02, steps=60)],
    ids=["constant", "falling", "cosine"],
)
@pytest.mark.parametrize("mu", [0.5, 0.9])
def test_nag_is_nesterov_with_the_gradient_at_the_lookahead_point(mu, lr, surrounding):
    extra, objective, _ = SURROUNDINGS[surrounding]
    sign = -1.0 if surrounding.startswith("maximize") else 1.0
    expected = lookahead_path(lr, mu, objective, sign)
    for which, read in ((0, lambda opt, p: opt.weights()), (1, lambda opt, p: p.copy())):
        p = start()
        opt = onepass.NAG(p, lr=lr, momentum=mu, **extra)
        assert_same_path(onepass_path(opt, p, sign, lambda opt=opt, p=p, read=read: read(opt, p)), expected[:, which])
    assert np.abs(expected[10, 0] - expected[10, 1]).max() > 1e-3, "weights and look-ahead point must differ"


@pytest.mark.parametrize("mu", [0.5, 0.9])
def test_nag_with_the_rate_outside_is_nesterov_at_a_constant_rate(mu):
    p = start()
    opt = onepass.NAG(p, lr=0.01, momentum=mu, lr_in_velocity=False)
    assert_same_path(onepass_path(opt, p, read=opt.weights), lookahead_path(0.01, mu)[:, 0])


def test_nag_weights_with_the_rate_outside_undo_the_last_velocity_part_under_a_schedule():
    lr, mu = schedules.exponential(0.02, rate=0.97), 0.8
    p, x, b, weights = start(), start(), np.zeros(SHAPE), []
    opt = onepass.NAG(p, lr=lr, momentum=mu, lr_in_velocity=False)
    for t in range(1, STEPS + 1):
        g = GRADIENT(x, t)
        b = mu * b + g
        weights.append(x - lr(t) * g)
        x = x - lr(t) * (g + mu * b)
    assert_same_path(onepass_path(opt, p, read=opt.weights), np.array(weights))


@pytest.mark.parametrize("inside", [True, False])
def test_nag_weights_take_momentum_and_rate_as_they_are_set_now(inside):
    p = start()
    opt = onepass.NAG(p, lr=0.01, lr_in_velocity=inside)
    for t in range(1, 4):
        opt.step(GRADIENT(p, t))
    np.testing.assert_allclose(opt.weights(), lookahead_path(0.01, 0.9)[2, 0], rtol=TOLERANCE)
    opt.param_groups[0].update({"lr": 0.5, "momentum": 0.25})
    velocity = opt.state[0]["velocity"]
    np.testing.assert_array_equal(opt.weights(), p + (0.25 if inside else 0.5 * 0.25) * velocity)


def test_nag_weights_are_new_arrays():
    p = start()
    opt = onepass.NAG(p)
    np.testing.assert_array_equal(opt.weights(), p)
    opt.step(GRADIENT(p, 1))
    before, weights = p.copy(), opt.weights()
    assert not np.shares_memory(weights, p)
    weights += 1.0
    np.testing.assert_array_equal(p, before)
    assert (opt.weights() != weights).all()


@pytest.mark.parametrize(("name", "betas"), [("amsgrad", (0.9, 0.999)), ("adam", (0.9, 0.999))])
def test_adamw_is_adam_with_decoupled_decay_of_one_percent(name, betas):
    p = start()
    opt = onepass.AdamW(p, lr=0.03, amsgrad=name == "amsgrad")
    method = (ReddiCorrected if name == "amsgrad" else KingmaBa)(0.03, betas, 1e-8)
    x, path = start(), []
    for t in range(1, STEPS + 1):
        x = x - method.step(GRADIENT(x, t), t) - 0.03 * 0.01 * x
        path.append(x)
    assert_same_path(onepass_path(opt, p), np.array(path))


DEFAULTS = {
    "SGD": (onepass.SGD, lambda: GradientDescent(0.01)),
    "Momentum": (onepass.Momentum, lambda: HeavyBall(0.01, 0.9)),
    "AdaGrad": (onepass.AdaGrad, lambda: DiagonalAdaGrad(0.01, 1e-10)),
    "AdaSqrt": (onepass.AdaSqrt, lambda: SquareFreeAdaGrad(0.001, 1e-8)),
    "RMSprop": (onepass.RMSprop, lambda: HintonRMSprop(0.01, 0.9, 1e-8)),
    "Adam": (onepass.Adam, lambda: KingmaBa(1e-3, (0.9, 0.999), 1e-8)),
    "AMSGrad": (onepass.AMSGrad, lambda: Reddi(1e-3, (0.9, 0.999), 1e-8)),
    "Nadam": (onepass.Nadam, lambda: Dozat(2e-3, (0.9, 0.999), 1e-8, mu=warming(0.9, 0.004))),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_hyper_parameters(name):
    cls, method = DEFAULTS[name]
    p = start()
    actual, expected = onepass_path(cls(p), p), textbook_path(method())
    assert np.abs(expected[-1] - start()).min() > 1e-5
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_default_nag():
    p = start()
    opt = onepass.NAG(p)
    assert_same_path(onepass_path(opt, p, read=opt.weights), lookahead_path(0.01, 0.9)[:, 0])


@pytest.mark.parametrize("name", METHODS)
def test_every_option_matters_on_this_function(name):
    """Or a case would pass for an optimizer that ignores its option."""
    method, cls, base, options = METHODS[name]

    def lr(t):
        return base * (1.0 + 0.5 * math.sin(t))

    end = textbook_path(method(lr))[-1]
    for option, value in options.items():
        others = {key: other for key, other in options.items() if key != option}
        if option == "eps" and value == 0.0:
            continue  # only makes room for eps_root
        if option == "eps_root" and options.get("eps") == 0.0:
            del others["eps"]
        if option == "amsgrad":
            others.pop("max_of_corrected", None)
        p = start()
        without = onepass_path(cls(p, lr=lr, **others), p)[-1]
        assert np.abs(without - end).max() > 1e-5, option
    for surrounding in SURROUNDINGS:
        if surrounding not in ("plain", "maximize"):  # maximize: the same path, by an optimizer that sees -g
            assert np.abs(textbook_path(method(lr), surrounding)[-1] - end).max() > 1e-5, surrounding


def test_maximize_climbs():
    p = start()
    opt = onepass.SGD(p, lr=0.05, maximize=True)
    opt.step(np.ones(SHAPE))
    np.testing.assert_allclose(p, start() + 0.05, rtol=TOLERANCE)
