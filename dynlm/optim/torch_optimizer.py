"""A rule as a ``torch.optim.Optimizer``: for training loops, schedulers, accelerate and the transformers Trainer.

The rules and their update in place are those of reading and meta-training (dynlm.optim.kernel); this module keeps
their state by parameter instead of by list of tensors. A step updates the parameters of one device, computing dtype and
number of past steps in one call (dynlm.optim.bundle), so each has the bias corrections of its age.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dynlm.optim.base import Clock, Prior, Rule
from dynlm.optim.bundle import Bundle, Member, computing
from dynlm.optim.gradients import first_not_finite, running_rms
from dynlm.optim.hub import resolve
from dynlm.optim.kernel import InPlaceUpdate, Scale
from dynlm.optim.sharing import fingerprint
from dynlm.types import InputError

LEAST = 1e-30  # mean RMS of a tensor that has seen no gradient but zero: cells divide by it
Priors = Mapping[str, Tensor] | Mapping[Tensor, Tensor] | Sequence[Prior]


class LearnedOptimizer(torch.optim.Optimizer):
    """Trains with an update rule of this package, in AdamW's units.

    θ ← (1 − lr weight_decay) θ + (lr / reference) (rule(θ) − θ), where ``reference`` is the rate at which the rule
    makes its own step: 1e-3 for ``general``, and the rule's own ``lr`` for one that has a rate. So what a script, a
    scheduler or the Trainer does with AdamW's ``lr`` and ``weight_decay`` means the same here.

    Args:
        params: parameters, (name, parameter) pairs, or groups with their own ``lr``, ``weight_decay``, ``maximize``.
            With names, ``priors`` may be given by name.
        rule: a rule (copied; its φ is not trained here), ``sgd``, ``adam`` or ``rms`` with their defaults, or what
            :func:`dynlm.optim.load` takes.
        lr: per step; None is the rule's reference. Any scheduler may move it.
        weight_decay: a step removes ``lr × weight_decay`` of a weight, apart from the gradient, as in AdamW.
        priors: static RMS of the gradient for rules that use one, by name or parameter, or the priors of
            :func:`dynlm.measure_priors`. Without it, it is the running RMS of the gradient, bias-corrected, of decay
            0.999, taken before each update (learned cells keep the row and column levels of the first step).
        max_grad_norm: gradients of all groups together are clipped to this norm before the rule sees them; None: not.
        maximize: climb instead.
        state_dtype: of the slots, float32 or bfloat16, which is rounded at random (repeatably) so that slow averages
            move; the rest of the state is float32 (float64 for such parameters).
        betas: taken where AdamW takes them, and without effect, as all that follow: the rule has averages of its own.
        eps: without effect.
        foreach: without effect: tensors are always updated together.
        fused: without effect.
        capturable: without effect: the clock is on the host.
        amsgrad: without effect.

    θ0 is a weight at its first step. All arithmetic is float32 (float64 for such parameters): half-precision weights
    are updated as a float32 copy and rounded. State follows a parameter that is converted or moved. A parameter
    without a gradient is left out of a step and does not age.

    Raises:
        InputError: a setting out of bounds, a complex parameter, a prior or rule that is missing or does not fit; in
            ``step`` a gradient that is not finite (on a CPU), with weights and state as they were.
    """

    def __init__(
        self,
        params: ParamsT,
        rule: str | Path | Rule = "general",
        lr: float | Tensor | None = None,
        weight_decay: float = 0.0,
        *,
        priors: Priors | None = None,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.float32,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        amsgrad: bool = False,
    ) -> None:
        self.rule = resolve(rule)
        self.state_dtype, self.max_grad_norm = state_dtype, max_grad_norm
        if self.state_dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"state_dtype is {self.state_dtype}: choose torch.float32 or torch.bfloat16")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise InputError(f"max_grad_norm is {self.max_grad_norm}: give a norm above 0, or None not to clip")
        self._given = _by_key(priors) if priors is not None and self.rule.uses_prior else None
        self._static: dict[Tensor, Prior] = {}
        self._updates: dict[torch.device, InPlaceUpdate] = {}
        self._fits: dict[Tensor, tuple[Any, ...]] = {}
        self._bundles: tuple[list[list[int]], list[Bundle]] = ([], [])
        self._memory_kind = _memory_kind(self.rule)
        self.reference_lr = self.rule.reference_lr
        settings = {"lr": self.reference_lr if lr is None else lr, "weight_decay": weight_decay}
        of_adamw = {"betas": betas, "eps": eps, "amsgrad": amsgrad, "foreach": foreach, "fused": fused}
        own = {"rule": fingerprint(self.rule), "loss": math.nan, "baseline": math.nan}
        super().__init__(params, settings | of_adamw | {"maximize": maximize, "capturable": capturable} | own)

    def __repr__(self) -> str:
        """Return the rule, and of each group what a user sets."""
        shown = ("lr", "weight_decay", "maximize")
        groups = [", ".join(f"{key}={group[key]}" for key in shown) for group in self.param_groups]
        return f"{type(self).__name__}(rule={self.rule.name!r}, {'; '.join(groups)})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a group may have its own ``lr``, ``weight_decay`` and ``maximize``, but not its own rule."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            if self._given is not None:
                self._static |= {p: _find(self._given, p, name) for name, p in _named(group)}
        except InputError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        for key in ("lr", "weight_decay"):
            if not 0 <= float(group[key]) < math.inf:
                raise InputError(f"{key} is {float(group[key])}: give a finite number that is not negative")
        if group["rule"] != self.defaults["rule"]:
            raise InputError(f"a group asks for the rule {group['rule']!r}: use one optimizer for each rule")
        if any(p.is_complex() for p in group["params"]):
            raise InputError("a parameter is complex: optimize torch.view_as_real of it")
        if any(hasattr(p, "to_local") for p in group["params"]):
            raise InputError(
                "a parameter is sharded (a DTensor, as fully_shard makes them), and a rule looks at whole tensors: "
                "train with DistributedDataParallel, or shard with another optimizer"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient.

        ``closure`` evaluates the model with gradients and returns its loss, which is returned here; rules that look at
        surprise see its value, and see no surprise without it.
        """
        with torch.enable_grad():
            loss = closure() if closure else None
        value = loss.detach() if isinstance(loss, Tensor) else loss
        bundles = self._bundled()
        maximize = [group["maximize"] for group in self.param_groups]
        grads: Sequence[Sequence[Tensor]] = [bundle.gradients(maximize) for bundle in bundles]
        self._require_finite(bundles, grads)
        clock = self._tick(math.nan if value is None else float(value))
        grads = self._clipped(grads)
        scales = [self._scale(group) for group in self.param_groups]
        for bundle, of_bundle, priors in zip(bundles, grads, self._priors(bundles, grads), strict=True):
            bundle.update(self._update_on(bundle.device), of_bundle, priors, scales, clock)
        changed = [p for bundle in bundles for p in bundle.parameters]
        if changed:  # kernels write where autograd does not look: an old graph must notice
            torch.autograd.graph.increment_version(changed)
        return loss

    def _tick(self, loss: float) -> Clock:
        """The losses so far live in the groups, so that they are saved; a baseline that is not finite starts anew."""
        last = self.param_groups[0]
        clock = Clock(int(math.isfinite(last["baseline"])), last["loss"], last["baseline"])
        clock.tick(loss)
        for group in self.param_groups:
            group["loss"], group["baseline"] = clock.loss, clock.baseline
        return clock

    def _scale(self, group: dict[str, Any]) -> Scale:
        lr = float(group["lr"])
        return Scale(lr / self.reference_lr, 1 - lr * float(group["weight_decay"]))

    def _bundled(self) -> list[Bundle]:
        """Return all parameters that have a gradient, as at the last step where nothing but gradients has changed."""
        given = [[p for p in group["params"] if p.grad is not None and p.numel()] for group in self.param_groups]
        if any(p.is_cuda and torch.cuda.is_current_stream_capturing() for of_group in given for p in of_group):
            raise InputError("a step cannot be captured in a CUDA graph: capture the model alone")
        which = [list(map(id, of_group)) for of_group in given]
        if self._bundles[0] == which and all(bundle.holds(self.state) for bundle in self._bundles[1]):
            return self._bundles[1]
        together: dict[Any, list[Member]] = {}
        for number, (group, of_group) in enumerate(zip(self.param_groups, map(set, given), strict=True)):
            for name, p in _named(group):
                if p in of_group:
                    state = self.state[p] = self._fitting(p)
                    key = p.device, computing(p), state["step"]
                    together.setdefault(key, []).append(Member(p, name, number, state))
        bundles = [Bundle(self.rule, members, self._memory_kind) for members in together.values()]
        self._bundles = which, bundles
        return bundles

    def _require_finite(self, bundles: Sequence[Bundle], grads: Sequence[Sequence[Tensor]]) -> None:
        """Look at all gradients before anything changes."""
        for bundle, of_bundle in zip(bundles, grads, strict=True):
            found = first_not_finite(of_bundle)
            if found is not None:
                p, name, *_ = bundle.members[found]
                called = f"parameter {name!r}" if name else f"a parameter of shape {tuple(p.shape)}"
                raise InputError(
                    f"the gradient of {called} is not finite: skip this step, or lower lr or the loss scale"
                )

    def _fitting(self, p: Tensor) -> dict[str, Any]:
        """The state of a parameter, converted where the parameter has been: ``net.double()`` keeps the objects."""
        now = (p.dtype, p.device, p.shape)
        state = self.state.get(p)
        if not state:
            state = self._initial(p)
        elif self._fits.get(p, now) != now or p not in self._fits:
            state = self._own(p, state)
        self._fits[p] = now
        return state

    def _clipped(self, grads: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        """As ``torch.nn.utils.clip_grad_norm_``, but the parameters' own gradients stay as they are."""
        if self.max_grad_norm is None or not grads:
            return grads
        norm = torch.nn.utils.get_total_norm([grad for of_bundle in grads for grad in of_bundle])
        factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return [[grad * factor.to(grad) for grad in of_bundle] for of_bundle in grads]

    def _layout(self, p: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of a parameter's state from its first step on, those of the rule's memory apart."""
        rule, shape, dtype = self.rule, tuple(p.shape), computing(p)
        width = (rule.slot_width,) * (rule.slot_width > 0)
        slot = shape + width, torch.bfloat16 if self.state_dtype == torch.bfloat16 else dtype
        layout = {f"slot{k}": slot for k in range(rule.n_slots)}
        if rule.uses_prior:
            layout |= {"theta0": (shape, dtype), "rms": (shape, dtype)}
        return layout | ({"tensor": ((rule.tensor_width,), dtype)} if rule.tensor_width else {})

    def _initial(self, p: Tensor) -> dict[str, Any]:
        layout = self._layout(p)
        state = {key: torch.zeros(shape, dtype=dtype, device=p.device) for key, (shape, dtype) in layout.items()}
        if self.rule.uses_prior:
            state["theta0"].copy_(p)
            if p in self._static:
                state["rms"].copy_(self._static[p].rms.view(p.shape))
        return {"step": 0, **state}

    def _priors(self, bundles: Sequence[Bundle], grads: Sequence[Sequence[Tensor]]) -> list[list[Prior]]:
        """Return what the rule may know of each tensor; the running RMS takes in this step's gradient."""
        if not self.rule.uses_prior:
            return [bundle.known for bundle in bundles]
        means = dict[Tensor, float]()
        for bundle, of_bundle in zip(bundles, grads, strict=True):
            rows = zip(bundle.parameters, bundle.known, of_bundle, strict=True)
            running = [(p, prior.rms, grad) for p, prior, grad in rows if p not in self._static]
            if running:
                parameters, rms, their = zip(*running, strict=True)
                means |= zip(parameters, running_rms(rms, their, bundle.age), strict=True)
        relative = _inverse(list(means.values()))
        of = {p: (max(mean, LEAST), relative) for p, mean in means.items()}
        of |= {p: (prior.mean_rms, prior.relative_rms) for p, prior in self._static.items()}
        return [
            [Prior(k.name, k.theta0, k.rms, *of[p]) for p, k in zip(bundle.parameters, bundle.known, strict=True)]
            for bundle in bundles
        ]

    def _update_on(self, device: torch.device) -> InPlaceUpdate:
        if device not in self._updates:
            self._updates[device] = InPlaceUpdate(copy.deepcopy(self.rule).to(device))
        return self._updates[device]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the state keeps its own precision under half-precision parameters, and is copied.

        Raises:
            InputError: the state of another rule, or of parameters of other shapes.
        """
        own: dict[Tensor, dict[str, Any]] = {}

        def take(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            self._fits.clear()
            found = incoming["param_groups"][0].get("rule", "another optimizer")
            if found != self.defaults["rule"]:
                raise InputError(f"this state is of {found}, not of {self.defaults['rule']}: load the rule's own")
            if "betas" not in incoming["param_groups"][0]:
                raise InputError(
                    "this state is of an earlier version, whose lr multiplied the rule's step: in each of its groups "
                    f"multiply lr by {self.reference_lr:g}, divide weight_decay by it, and add betas"
                )
            places = [place for group in incoming["param_groups"] for place in group["params"]]
            parameters = [p for group in self.param_groups for p in group["params"]]
            for place, p in zip(places, parameters, strict=False):  # torch compares their numbers
                if incoming["state"].get(place):
                    own[p] = self._own(p, incoming["state"][place])
            return {**incoming, "state": {}}  # torch would cast it to the parameters' dtype

        # after the hooks of others that change the incoming state, and before those that look at the result
        before = self.register_load_state_dict_pre_hook(take)
        with before, self.register_load_state_dict_post_hook(lambda _: self.state.update(own), prepend=True):
            super().load_state_dict(state_dict)

    def _own(self, p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of one parameter's saved state on its device, in the dtypes of this optimizer."""
        for key, (shape, _) in (layout := self._layout(p)).items():
            found = tuple(saved[key].shape) if key in saved else "missing"
            if found != shape:
                raise InputError(f"saved {key!r} is {found}, not {shape}: give the same parameters in the same order")
        dtypes = {key: layout[key][1] if key in layout else computing(p) for key in saved if key != "step"}
        own = {key: saved[key].detach().to(p.device, dtype, copy=True) for key, dtype in dtypes.items()}
        return {"step": int(saved["step"]), **own}

    def __getstate__(self) -> dict[str, Any]:
        """Compiled functions are not pickled: they are built again when needed."""
        names = ("rule", "reference_lr", "state_dtype", "max_grad_norm", "_given", "_static", "_memory_kind")
        return (
            super().__getstate__()
            | {name: getattr(self, name) for name in names}
            | {"_updates": {}, "_fits": {}, "_bundles": ([], [])}
        )


def _named(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Return (name, parameter) of a group, without what DDP and torch.compile put before a name; "" without names."""
    names = group.get("param_names") or [""] * len(group["params"])
    names = [name.replace("_orig_mod.", "").removeprefix("module.") for name in names]
    return list(zip(names, group["params"], strict=True))


def _memory_kind(rule: Rule) -> Any:
    """Return the memory of one weight: shows which structure the saved tensors of a rule's memory are joined to."""
    blank = torch.zeros(1, 1)
    prior = Prior("", blank, blank, 1.0, 1.0)
    state = rule.init([prior])
    state.clock.tick(math.nan)
    return rule.observe([blank], [blank], state, [prior])[1]


def _inverse(means: Sequence[float]) -> float:
    return len(means) / sum(means) if sum(means) > 0 else 0.0


def _by_key(priors: Priors) -> dict[Any, Prior]:
    if not isinstance(priors, Mapping):
        return {prior.name: prior for prior in priors}
    means = {key: float(rms.double().mean()) for key, rms in priors.items()}
    relative = _inverse(list(means.values()))
    return {key: Prior("", rms, rms, max(means[key], LEAST), relative) for key, rms in priors.items()}


def _find(given: dict[Any, Prior], p: Tensor, name: str) -> Prior:
    prior = given.get(p) or given.get(name)
    called = f"parameter {name!r}" if name else f"a parameter of shape {tuple(p.shape)} without a name"
    if prior is None:
        raise InputError(f"no prior for {called}: key by parameter or pass named_parameters(), or give no priors")
    if prior.rms.numel() != p.numel():
        raise InputError(f"the prior of {called} is {tuple(prior.rms.shape)}, not {tuple(p.shape)}: measure it again")
    return prior
