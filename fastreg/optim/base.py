"""The step that the optimizers share, and the way of a parameter to it.

The classes are torch's own with another ``step``: arguments, groups, hooks and state are theirs, and a state of theirs
can be loaded here and taken back. Where a step runs:

    kernels    dense CUDA parameters: all groups and tensors of one kind together (``ops/optimizers.py``)
    lists      dense CPU parameters, by torch's fused step and what our options do around it (``ops/foreach.py``)
    torch      what has none of our options: complex and sparse tensors, where the user has chosen another step of torch
    ATen       all the rest, tensor by tensor, by the definition

Between two steps a plan is kept, with the tables of addresses (``plan.py``). What may have changed since is asked in
every step: gradients, the memory of parameters, gradients and state, tensors of the state, options that choose another
kernel. A step that a CUDA graph records takes the plan along: its replays read those tables.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import chain, compress
from operator import is_
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastreg.ops.backend import recording
from fastreg.ops.layout import dense
from fastreg.ops.multi_tensor.bulk import gradients
from fastreg.ops.multi_tensor.foreach import Lists, squares, step_, walks
from fastreg.ops.multi_tensor.optimizers import (
    Member,
    Numbers,
    Rule,
    check_beside,
    clipped,
    compute_dtype,
    define,
    laid_out,
    projection,
    same_layout,
    takes,
)
from fastreg.optim.distributed import (
    by_shards,
    check_max_norm,
    is_distributed,
    local,
    local_gradient,
    shards,
    total,
)
from fastreg.optim.options import OPTIONS, changes_before, check, has_options, values_of
from fastreg.optim.plan import Listed, Plan


def _is_ordinary(p: Tensor, g: Tensor) -> bool:
    return p.is_floating_point() and not p.is_meta and g.layout == torch.strided


def _counter(count: float | Tensor, device: torch.device | None) -> Tensor:
    """A counter of steps: fp32 [] on the device of a kernel, or else a tensor as torch's own, which lie on the CPU."""
    if isinstance(count, Tensor):
        if device is not None:
            count = count.to(device, torch.float32)
            return count.reshape(()) if count.dim() else count
        if count.dtype in (torch.float32, torch.float64):
            return count
        count = count.item()
    wide = device is None and torch.get_default_dtype() == torch.float64
    return torch.full((), count, dtype=torch.float64 if wide else torch.float32, device=device or "cpu")


class Regularized(Optimizer):
    """Mixed into a class of torch, before it. What a class says for itself comes first."""

    _theirs: type[Optimizer] | None  # the class of torch with this step, where there is one
    _plan: Plan | None = None
    _loading: dict[str, Any] | None = None
    _aside: dict[Tensor, dict[str, Any]]
    _checked: list | tuple = ()  # the options of all groups, as they were when last checked

    # --- what a class of its own says

    def _decoupled(self, group: dict) -> bool:
        raise NotImplementedError

    def _rule(self, group: dict) -> Rule:
        raise NotImplementedError

    def _numbers(self, group: dict) -> Numbers:
        raise NotImplementedError

    def _moments(self, group: dict) -> list[str]:
        """The keys of the tensors like the parameter in its state; the first comes as ``Member.first``, and so on."""
        raise NotImplementedError

    def _torch_step(
        self, group: dict, params: list[Tensor], pieces: list[Tensor], grads: list[Tensor]
    ) -> None:
        """A step of torch that is not fused, for parameters whose state has been made (or is torch's to make)."""
        raise NotImplementedError

    # --- gradient scaling

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the step takes the scale of gradients, and whether one is infinite, from ``torch.amp.GradScaler``.

        To torch, which asks this in the scaler's step: yes. Others take a yes to say that gradients cannot be unscaled
        before the step, and refuse to clip them (Lightning, without a scale as well): to them, no.
        """
        return sys._getframe(1).f_globals.get("__name__", "").startswith("torch.")

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's ``__init__`` says it with ``fused=True``."""

    # --- options

    def _take(self, arguments: dict[str, Any]) -> None:
        """The end of ``__init__``: our options out of its arguments."""
        options = {key: arguments[key] for key in OPTIONS}
        self.defaults.update(options)
        for group in self.param_groups:
            said = group.get("max_norm_dim")
            for key, value in options.items():
                group.setdefault(key, value)
            self._check(group, said)
        if options["max_norm_dim"] is not None and all(g["max_norm"] is None for g in self.param_groups):
            raise ValueError("max_norm_dim says along what max_norm goes, but no group has a max_norm")

    def _check(self, group: dict, said: Any) -> None:
        """said: the max_norm_dim that came with the group, and not from the defaults."""
        check(group, self._decoupled(group))
        if said is not None and group["max_norm"] is None:
            raise ValueError("max_norm_dim says along what max_norm goes, but the group has no max_norm")
        group.setdefault("lr_0", float(group["lr"]))

    def _check_again(self) -> None:
        """Checks all groups where an option is another than at the last time."""
        if not self._are_checked():
            for group in self.param_groups:
                check(group, self._decoupled(group))
            self._checked = self._values()

    def _are_checked(self) -> bool:
        found = self._values()
        return len(found) == len(self._checked) and all(map(is_, found, self._checked))

    def _values(self) -> list:
        found = []
        for group in self.param_groups:
            found += values_of(group)
            found.append(self._decoupled(group))
        return found

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        said = param_group.get("max_norm_dim") if isinstance(param_group, dict) else None
        super().add_param_group(param_group)
        if "l1" in self.defaults:
            try:
                self._check(self.param_groups[-1], said)
            except (TypeError, ValueError):
                self.param_groups.pop()
                raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        loading = self._loading or {"options": [{}] * len(self.param_groups)}
        for group, own in zip(self.param_groups, loading["options"], strict=True):
            # What a checkpoint of torch has no word for stays as it is.
            for key, value in OPTIONS.items():
                group.setdefault(key, own.get(key, self.defaults.get(key, value)))
            group.setdefault("lr_0", own.get("lr_0", float(group["lr"])))
        self._plan, self._aside = None, {}
        if "state_dict" in loading:
            self._restore_dtypes(loading["state_dict"])

    def state_dict(self) -> dict[str, Any]:
        """As torch's, counters of steps included: on the CPU, as they are now, unless a group is capturable or fused.

        The kernels count on the device, where torch's other steps would wait for each counter.
        """
        found = super().state_dict()
        states = found["state"]
        alike: dict[tuple, list[int]] = {}
        for group in found["param_groups"]:
            if group.get("capturable") or group.get("fused"):
                continue
            for i in group["params"]:
                counter = states.get(i, {}).get("step")
                if isinstance(counter, Tensor) and counter.is_cuda:
                    alike.setdefault((counter.device, counter.dtype, counter.shape), []).append(i)
        for places in alike.values():
            counters = torch.stack([states[i]["step"] for i in places]).cpu()
            for i, counter in zip(places, counters, strict=True):
                states[i] = {**states[i], "step": counter.clone()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its dtype beside parameters of 16 bits, to which torch rounds it.

        Options that the groups of ``state_dict`` do not have, as those of torch's, stay as they are.
        """
        options = [{key: group[key] for key in (*OPTIONS, "lr_0")} for group in self.param_groups]
        loading: dict[str, Any] = {"options": options}
        self._loading = loading
        # After the hooks of the user, which may change what is loaded.
        last = self.register_load_state_dict_pre_hook(lambda _, found: loading.update(state_dict=found))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            self._loading = None

    def _restore_dtypes(self, loaded: dict[str, Any]) -> None:
        ids = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, p in zip(ids, params, strict=True):
            for key, value in loaded["state"].get(i, {}).items():
                if key != "step" and isinstance(value, Tensor) and value.dtype != self.state[p][key].dtype:
                    self.state[p][key] = value.to(device=p.device)

    # --- the step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step. The order of operations is an equation in ``kernels/optimizers.py``.

        Args:
            closure: evaluates the model anew and returns the loss.
        """
        if any(group["differentiable"] for group in self.param_groups):
            return self._differentiable_step(closure)
        if "capturable" in self.defaults:
            self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _differentiable_step(self, closure: Callable[[], float] | None) -> float | None:
        ours = any(group[key] != value for group in self.param_groups for key, value in OPTIONS.items())
        if self._theirs is None or ours:
            raise RuntimeError("differentiable=True takes torch's step, which has none of our options")
        step: Any = self._theirs.step
        return (step.__wrapped__ if getattr(step, "hooked", False) else step)(self, closure)

    @torch._disable_dynamo
    def _step(self) -> None:
        self._check_again()
        groups = self.param_groups
        params = list(chain.from_iterable(group["params"] for group in groups))
        grads = gradients(params)
        structure = tuple(self._structure(group) for group in groups)
        plan, recorded = self._plan, recording()
        if recorded:
            self._plan = (
                None  # the graph takes it along: its replays read those tables, which no other step may write
            )
        if plan is not None and not plan.knows(structure, params, self.state):
            plan = None
        pieces = params
        if any(map(is_distributed, params)) if plan is None else plan.distributed:
            pieces, grads = list(map(local, params)), list(map(local_gradient, params))
        if plan is None or not plan.follow(grads, pieces):
            if all(g is None for g in grads) and all(group["max_grad_norm"] is None for group in groups):
                return
            plan = self._make(structure, params, grads, pieces)
            self._plan = None if recorded else plan
        elif recorded:
            plan.keep()
        self._run(plan, grads, pieces)

    def _structure(self, group: dict) -> tuple:
        damped, clips = group.get("dampening", 0) != 0, group["max_grad_norm"] is not None
        where = changes_before(group), has_options(group), self._fuses(group)
        return len(group["params"]), self._rule(group), clips, damped, *where

    def _make(
        self, structure: tuple, params: list[Tensor], grads: list[Tensor | None], pieces: list[Tensor]
    ) -> Plan:
        """Decides where each parameter is stepped, makes its state, and writes the tables."""
        owners = [k for k, group in enumerate(self.param_groups) for _ in group["params"]]
        clips = [self.param_groups[owner]["max_grad_norm"] is not None for owner in owners]
        plan = Plan(structure, params, owners, list(by_shards(list(compress(params, clips)))))
        for i, p in enumerate(params):
            group = self.param_groups[owners[i]]
            if group["max_norm"] is not None:
                check_max_norm(p, group["max_norm_dim"])
            g = grads[i]
            if g is not None:
                self._refuse(p, pieces[i], g, group)
        batches: dict[tuple, tuple[list[Member], list[int]]] = {}
        copies = False
        for i, (p, piece, g) in enumerate(zip(params, pieces, grads, strict=True)):
            if g is None:
                continue
            group = self.param_groups[owners[i]]
            rule = self._rule_of(p, group)
            if not takes(piece, g, rule):
                self._place(plan, i, piece, g, owners[i], rule)
                continue
            self._prepare(p, piece, group, rule, kernels=True)
            if not same_layout(g, piece):
                copies, g = True, laid_out(g, piece)
            member = self._member(i, p, piece, g, owners[i], rule)
            key = shards(p) if clips[i] else None
            over = shards(p) if rule.rows is False else None
            dtypes = p.dtype, g.dtype, p.dtype if member.first is None else member.first.dtype
            counts = member.step is not None
            kind = rule, piece.device, dtypes, projection(piece, rule, over), counts, over, clips[i], key
            batches.setdefault(kind, ([], []))
            batches[kind][0].append(member)
            batches[kind][1].append(i)
        plan.add_batches(batches, copies)
        plan.remember(grads, pieces, self.state)
        return plan

    def _place(self, plan: Plan, i: int, piece: Tensor, g: Tensor, owner: int, rule: Rule) -> None:
        """Finds the place of a parameter that no kernel takes."""
        p, group = plan.params[i], self.param_groups[owner]
        if not _is_ordinary(p, g):
            plan.torch.setdefault(owner, []).append(i)
            return
        self._prepare(p, piece, group, rule, kernels=False)
        member = self._member(i, p, piece, g, owner, rule)
        state = (t for t in (member.first, member.second, member.largest) if t is not None)
        small = compute_dtype(p.dtype) != p.dtype
        if self._fuses(group) and walks(member, rule) and not (small and changes_before(group)):
            over = shards(p) if rule.rows is False else None
            key = shards(p) if group["max_grad_norm"] is not None else None
            plan.add_listed(Listed(owner, rule, p.dtype, over, key), i)
        elif has_options(group) or any(t.dtype != p.dtype for t in state):
            plan.rest.append(i)
        else:
            plan.torch.setdefault(owner, []).append(i)

    def _refuse(self, p: Tensor, piece: Tensor, g: Tensor, group: dict) -> None:
        """Raises for what no step can take, before anything has changed."""
        check_beside(piece, g, "gradient")
        rule, state = self._rule_of(p, group), self.state.get(p, {})
        used = {**dict.fromkeys(self._moments(group), True), "master": rule.master, "ema": rule.average}
        for key, is_used in used.items():
            if is_used and state.get(key) is not None:
                check_beside(piece, local(state[key]), key)
        if g.is_sparse and "betas" in self.defaults:
            raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        if has_options(group) and (g.is_sparse or not p.is_floating_point() or p.is_meta):
            raise RuntimeError(
                "l1, max_norm, max_grad_norm and the other options beside those of torch need parameters of floating "
                f"point and dense gradients, but got {p.dtype} on {p.device}, and a gradient of {g.layout}"
            )

    @staticmethod
    def _fuses(group: dict) -> bool:
        """Whether CPU parameters take torch's fused step: with our options always, else unless the user has chosen."""
        chosen = group["fused"] if group["foreach"] is None else False
        return chosen is not False or has_options(group)

    def _rule_of(self, p: Tensor, group: dict) -> Rule:
        """The rule of the group, without what there is nothing to do for in this parameter."""
        rule = self._rule(group)
        small = compute_dtype(p.dtype) != p.dtype if p.is_floating_point() else False
        rows = None if rule.rows and p.dim() < 2 else rule.rows
        at_random = rule.at_random and p.dtype == torch.bfloat16
        return rule._replace(master=rule.master and small, at_random=at_random, rows=rows)

    def _prepare(self, p: Tensor, piece: Tensor, group: dict, rule: Rule, kernels: bool) -> None:
        """Makes what is missing in the state of a parameter, and brings the rest to where the step needs it."""
        moments = self._moments(group)
        if not (moments or rule.at_random or rule.master or rule.average):
            return
        state = self.state[p]
        dtype = compute_dtype(p.dtype) if rule.master else p.dtype
        counters = self._counters(p, group, rule)
        if counters is not None:
            fresh = bool(moments) and state.get(moments[0]) is None
            counter = counters.get("step")
            if counter is None or (fresh and "betas" not in group):
                # torch's SGD counts no steps: where it has left a buffer, the first one is over
                counter = 0.0 if fresh or "betas" in group or not moments else 1.0
            counters["step"] = _counter(counter, piece.device if kernels else None)
        for key in moments:
            if state.get(key) is None:
                state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            elif rule.master and state[key].dtype != dtype:
                state[key] = state[key].to(dtype)
        if rule.master and state.get("master") is None:
            state["master"] = p.detach().to(dtype)
        if rule.average and state.get("ema") is None:
            state["ema"] = p.detach().to(compute_dtype(p.dtype), copy=True)
        if kernels and not is_distributed(p):
            for key in (*moments, "master", "ema"):
                if key in state and not same_layout(state[key], p):
                    state[key] = laid_out(state[key], p)

    def _counters(self, p: Tensor, group: dict, rule: Rule) -> dict | None:
        """Where the counter of steps of a parameter is kept, as "step", or None where none is needed.

        Adam's and that of random rounding are in the state. SGD has none in torch, and needs one only for a first step
        that is not dampened: it is kept aside, so that checkpoints have the keys of torch's.
        """
        if "betas" in group or rule.at_random:
            return self.state[p]
        if rule.momentum and group["dampening"] != 0:
            return self.__dict__.setdefault("_aside", {}).setdefault(p, {})
        return None

    def _member(self, i: int, p: Tensor, piece: Tensor, g: Tensor, owner: int, rule: Rule) -> Member:
        group = self.param_groups[owner]
        state = self.state.get(p, {})
        moments = [local(state[key]) for key in self._moments(group)]
        first, second, largest = (*moments, None, None, None)[:3]
        return Member(
            piece,
            g,
            first,
            second,
            largest,
            master=local(state["master"]) if rule.master else None,
            average=local(state["ema"]) if rule.average else None,
            step=(self._counters(p, group, rule) or {}).get("step"),
            group=owner,
            ordinal=i,
        )

    # --- the step itself

    def _run(self, plan: Plan, grads: list[Tensor | None], pieces: list[Tensor]) -> None:
        numbers = [self._numbers(group) for group in self.param_groups]
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):
            found_inf = None  # the number 0, where no device had gradients
        squared = self._squared(plan, grads, pieces) if plan.sums else None
        norm = None
        for batch in plan.batches:
            device = batch.device
            mine = None if squared is None or not batch.clips else squared.to(device)
            if mine is not None:
                norm = torch.empty((), dtype=torch.float32, device=device)
            batch.advance(
                batch.numbers_on_device(numbers),
                mine,
                norm,
                None if scale is None else torch.as_tensor(scale, dtype=torch.float32, device=device),
                None if found_inf is None else found_inf.to(device, torch.float32),
            )
            own = [numbers[k] for k in batch.groups]
            pulled = any(isinstance(n.l2, Tensor) or n.l2 or n.l1_subgradient for n in own)
            batch.step(pulled, any(n.l1_proximal for n in own))
            if batch.form.projection == "partial":
                batch.fold()
                if batch.shards is not None:
                    batch.shards.sum_(batch.squared)
                batch.project()
            batch.release()
        averages = [average for average in (known() for known in plan.averages) if average is not None]
        for written in (plan.written, averages):
            if written:
                torch.autograd.graph.increment_version(written)
        if plan.lists or plan.torch or plan.rest:
            self._step_the_rest(plan, grads, pieces, numbers, scale, found_inf, squared)
        if squared is not None:
            if norm is None:
                norm = squared.sqrt() if scale is None else squared.sqrt() / abs(float(scale))
            self.grad_norm = norm

    def _squared(self, plan: Plan, grads: list[Tensor | None], pieces: list[Tensor]) -> Tensor:
        """fp64 []: the sum of squares of all gradients of groups that clip, over all processes."""
        device = pieces[0].device
        sums = {key: torch.zeros((), dtype=torch.float64, device=device) for key in plan.sums}
        for batch in plan.batches:
            if batch.clips:
                batch.sum_squares()
                sums[batch.key] += batch.partials.sum(dtype=torch.float64).to(device)
        for kind, places in plan.lists.items():
            if self.param_groups[kind.owner]["max_grad_norm"] is not None:
                sums[kind.key] += squares(_at(places, grads)).to(device)
        for i, g in zip(plan.rest, _at(plan.rest, grads), strict=True):
            if self.param_groups[plan.owners[i]]["max_grad_norm"] is not None:
                sums[shards(plan.params[i])] += squares([dense(g)]).to(device)
        return total(sums)

    def _step_the_rest(
        self,
        plan: Plan,
        grads: list[Tensor | None],
        pieces: list[Tensor],
        numbers: list[Numbers],
        scale: float | Tensor | None,
        found_inf: Tensor | None,
        squared: Tensor | None,
    ) -> None:
        """Steps what no kernel takes: one by one, or by torch, whose step has no scale and no infinities."""
        if found_inf is not None and float(found_inf):
            return
        norm = None
        if squared is not None:
            norm = float(squared.sqrt()) / (1 if scale is None else abs(float(scale)))

        def gain_of(group: dict) -> float:
            gain, most = 1.0 if scale is None else 1 / float(scale), group["max_grad_norm"]
            return gain if most is None or norm is None else gain * clipped(norm, most)

        by_definition = list(plan.rest)
        for kind, places in plan.lists.items():
            if kind.dtype.itemsize < 4 and scale is not None:  # its gradients would be rounded once more
                by_definition += places
                continue
            lists = self._lists(plan, kind, places, grads, pieces)
            step_(lists, kind.rule, numbers[kind.owner], gain_of(self.param_groups[kind.owner]), kind.over)
        for owner, places in plan.torch.items():
            if scale is not None:  # which torch's steps do not know
                by_definition += places
                continue
            params, parts, own = _at(places, plan.params), _at(places, pieces), _at(places, grads)
            self._torch_step(self.param_groups[owner], params, parts, own)
        for i in by_definition:
            p, g, owner = plan.params[i], grads[i], plan.owners[i]
            assert g is not None
            group = self.param_groups[owner]
            rule = self._rule_of(p, group)
            member = self._member(i, p, pieces[i], g, owner, rule)
            over = shards(p) if rule.rows is False else None
            define(member, rule, numbers[owner], gain_of(group), over)

    def _lists(
        self, plan: Plan, kind: Listed, places: list[int], grads: list[Tensor | None], pieces: list[Tensor]
    ) -> Lists:
        """The arguments of a step of one kind. (Reading them singly takes longer than the step of small tensors.)"""
        group, rule = self.param_groups[kind.owner], kind.rule
        params, moments = _at(places, plan.params), self._moments(group)
        states = [self.state[p] for p in params] if moments or rule.average else []
        counters = states
        if "betas" not in group:  # all have one, or none
            counts = self._counters(params[0], group, rule) is not None
            found = [self._counters(p, group, rule) for p in params] if counts else []
            counters = [counter for counter in found if counter is not None]

        def column(key: str) -> list[Tensor]:
            found = [state[key] for state in states]
            return list(map(local, found)) if plan.distributed else found

        first, second, largest = (*map(column, moments), [], [], [])[:3]
        return Lists(
            _at(places, pieces),
            _at(places, grads),
            first,
            second,
            largest,
            column("ema") if rule.average else [],
            [counter["step"] for counter in counters],
        )


def _at(places: list[int], tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """The tensors at these places of a plan, in its order, which has seen that they are there."""
    found = tensors if len(tensors) == len(places) else [tensors[i] for i in places]
    return cast("list[Tensor]", found)
