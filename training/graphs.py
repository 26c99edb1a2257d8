"""Replaying a model's calls as CUDA graphs: the host starts one graph where it would start every kernel by itself.

A call, and its backward pass where there is one, is recorded for each kind of inputs (shapes, types, values that are no
tensors), autocast and mode of gradients, and replayed from then on. The recordings of a model share their memory. What a
recording holds beside its inputs is looked at in every call: where the weights lie and which adapters are on. After a change
the call is recorded anew. Host code inside the model does not run in a replay.

PyTorch's own make_graphed_callables is not enough here: it leaves the gradients of weights where the next backward pass writes,
so that accumulated gradients are wrong; while it records, a data loader's thread that pins memory breaks
the recording; and it needs weights without hooks, which DDP's are not. Source: CUDA semantics, section CUDA graphs, of
PyTorch's documentation.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .config import UserError
from .device import best_device

NAME = "promag_graphs"  # name of the hook
RECORDINGS = 8  # recordings of a model; the one that was not used for the longest time makes room for a new one
WARM_UP = 3  # calls before a recording, in which libraries choose kernels and blocks are compiled
TENSOR = object()  # in place of a tensor among a call's arguments

Results = Sequence[Tensor | None]


class Recorder(Protocol):
    """What records calls: a GPU, or in tests a stand-in for it."""

    @property
    def device(self) -> torch.device:
        """Where calls can be recorded."""
        ...

    def warm_up(self, call: Callable[[], Any]) -> None:
        """Call it as it will be recorded, without recording."""
        ...

    def record(self, call: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """Return a call's results and what computes them again, into the same tensors."""
        ...

    def record_step(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return what does again what `step` does to tensors in place; recording does not do it."""
        ...


class CudaRecorder:
    """Records calls on the current GPU, in one pool of memory; raises UserError without a GPU."""

    def __init__(self) -> None:
        check_graphs(best_device())
        self.pool = torch.cuda.graph_pool_handle()
        # Its own: destroying a graph frees what cuBLAS keeps for its stream, which another recorder's graphs may still use.
        self.stream = torch.cuda.Stream()

    @property
    def device(self) -> torch.device:
        """The current GPU: kernels of another one would not be recorded."""
        return torch.device("cuda", torch.cuda.current_device())

    def warm_up(self, call: Callable[[], Any]) -> None:
        """Call it WARM_UP times on a stream of its own."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)

    def record(self, call: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """Record a call; other threads may use the GPU meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            results = call()
        return results, graph.replay

    def record_step(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record a step; other threads may use the GPU meanwhile."""
        return self.record(lambda: step() or ())[1]


def make_recorder(enabled: bool) -> Recorder | None:
    """Return what records on the GPU, or None; raises UserError without a GPU."""
    return CudaRecorder() if enabled else None


def check_graphs(device: torch.device) -> None:
    """Raise UserError for a device that has no CUDA graphs."""
    if device.type != "cuda":
        raise UserError(f"graphs: CUDA graphs need a GPU, and this runs on {device.type}; leave them off")


def enable_graphs(model: Any, recorder: Recorder | None = None, recordings: int = RECORDINGS) -> None:
    """Replay a model's calls from now on; what a call returns may be kept.

    Only calls in the mode that the model is in now, training or not, are replayed; others run as they are. The backward pass of
    a call has to run before the next call, and once.

    Args:
        model: on the current GPU when it is called. Its parts must have no hooks: offloading and caches have.
        recorder: what records; None for the GPU.
        recordings: the most that are held.

    Raises UserError without a GPU; ValueError for hooks, and where graphs are enabled already.
    """
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(Graphs(recorder or CudaRecorder(), recordings), NAME)


def disable_graphs(model: Any) -> None:
    """Run a model's calls as they are from now on and let go of the recordings' memory; nothing where they are not enabled."""
    registry: Any = getattr(model, "_diffusers_hook", None)
    if registry is not None and (hook := registry.get_hook(NAME)):
        hook.recordings.clear()
        registry.remove_hook(NAME, recurse=False)


def recompute_block(block: nn.Module, *arguments: Any) -> Any:
    """Call a block and recompute it in the backward pass, as a recording allows: blocks draw no random numbers."""
    return checkpoint(block.__call__, *arguments, use_reentrant=False, preserve_rng_state=False)


class Recording:
    """One call on memory of its own, and its backward pass where anything requires a gradient.

    Args:
        call: takes inputs, and tensors in place of the weights; returns its outputs.
        inputs: tensors of the kind that it is replayed with.
        weights: those that get gradients.
        recorder: what records.
    """

    def __init__(
        self,
        call: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]],
        inputs: Sequence[Tensor],
        weights: Sequence[nn.Parameter],
        recorder: Recorder,
    ):
        self.call, self.weights, self.device_type = call, weights, recorder.device.type
        learning = torch.is_grad_enabled()
        self.inputs = [x.detach().clone().requires_grad_(learning and x.requires_grad) for x in inputs]
        # The same memory as other leaves of autograd: those of the weights may belong to DDP, and to another stream.
        self.leaves = [nn.Parameter(weight.detach()) for weight in weights]
        self.sources: list[Tensor] = [*(x for x in self.inputs if x.requires_grad), *self.leaves]
        self.gradients_of_outputs: list[Tensor] = []
        self.gradients: Results = []
        self.live: list[Tensor] = []  # outputs with their autograd graph, while recording
        recorder.warm_up(self._both)
        self.outputs, self.replay_forward = recorder.record(self._forward)
        if self.sources:
            self.gradients, self.replay_backward = recorder.record(self._backward)
        self.live = []

    def fill(self, inputs: Sequence[Tensor]) -> None:
        """Copy a call's inputs to where the recording reads them."""
        with torch.no_grad():
            for own, given in zip(self.inputs, inputs, strict=True):
                own.copy_(given)

    def _both(self) -> None:
        self._forward()
        if self.sources:
            self.gradients_of_outputs = self.gradients_of_outputs or [torch.zeros_like(x) for x in self.live]
            self._backward()
        self.live = []

    def _forward(self) -> Results:
        self.live = self.call(self.inputs, self.leaves)
        return [x.detach() for x in self.live]

    def _backward(self) -> Results:
        with torch.autocast(self.device_type, enabled=False):  # as backward passes are without a recording
            return torch.autograd.grad(self.live, self.sources, self.gradients_of_outputs, allow_unused=True)


class Graphs(ModelHook):
    """Records and replays the calls of the model that it is registered on."""

    fn_ref: Any

    def __init__(self, recorder: Recorder, recordings: int):
        super().__init__()
        self.recorder, self.most = recorder, recordings
        self.recordings: dict[Any, tuple[Recording, Any]] = {}  # the newest last, each with the structure of its outputs
        self.lent: list[tuple[nn.Parameter, Tensor]] = []  # weights, and the recorded gradients that they may hold
        self.turn = 0  # how often the memory that all recordings share was used

    def __deepcopy__(self, memo: Any) -> NoReturn:
        """Raise ValueError: a copy's calls would run the original."""
        raise ValueError("a model with graphs cannot be copied; call disable_graphs first")

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Remember the mode in which calls are replayed, and the model's parts; raises ValueError for parts with hooks."""
        self.training = module.training
        self._list_parts(module)
        self._state(module)
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Replay a call of the model; record it first where that has not been done."""
        if module.training != self.training:
            return self.fn_ref.original_forward(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._take_back()
        state, modes = self._state(module), _modes(self.recorder.device.type)
        key = (structure, *map(_kind, leaves), *modes, state)
        found = self.recordings.pop(key, None)
        if found is None:
            while len(self.recordings) >= self.most:
                del self.recordings[next(iter(self.recordings))]
            found = self._record(module, leaves, structure, modes)
        self.recordings[key] = found
        recording, outputs_structure = found
        recording.fill(tensors)
        if recording.sources:
            trained = [x for x in tensors if x.requires_grad]
            outputs = _Replay.apply(self, recording, *trained, *recording.weights)
        else:
            outputs = self.replay(recording)
        return tree_unflatten(list(outputs), outputs_structure)  # pyright: ignore[reportArgumentType]

    def replay(self, recording: Recording) -> tuple[Tensor, ...]:
        """Compute a recording's outputs and return copies of them."""
        self.turn += 1
        recording.replay_forward()
        return tuple(x.clone() for x in recording.outputs if x is not None)

    def replay_backward(self, recording: Recording, turn: int, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Compute the gradients of a recording's sources from those of its outputs.

        Raises RuntimeError where its memory was used again since the forward pass of that turn.
        """
        if turn != self.turn:
            raise RuntimeError("graphs: the backward pass of a call has to run before the next call, and once")
        self.turn += 1
        for own, given in zip(recording.gradients_of_outputs, gradients, strict=True):
            own.copy_(given)
        recording.replay_backward()
        count = len(recording.sources) - len(recording.weights)
        of_inputs, of_weights = recording.gradients[:count], recording.gradients[count:]
        pairs = zip(recording.weights, of_weights, strict=True)
        self.lent = [(weight, gradient) for weight, gradient in pairs if gradient is not None]
        copies = [None if gradient is None else gradient.clone() for gradient in of_inputs]
        return [*copies, *(None if gradient is None else gradient.detach() for gradient in of_weights)]

    def _take_back(self) -> None:
        """Move gradients that weights still hold in a recording's memory out of it: those of an earlier batch of a step."""
        for weight, gradient in self.lent:
            if weight.grad is not None and weight.grad.data_ptr() == gradient.data_ptr():
                weight.grad = weight.grad.clone()
        self.lent = []

    def _record(self, module: nn.Module, leaves: Sequence[Any], structure: Any, modes: Sequence[Any]) -> tuple[Recording, Any]:
        """Return a recording of a call, and the structure of its outputs."""
        device, (learning, _, autocast, dtype) = self.recorder.device, modes
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        named = {name: weight for name, weight in module.named_parameters() if weight.requires_grad and learning}
        for tensor in (*tensors, *module.parameters()):
            if tensor.device != device:
                raise ValueError(f"graphs: a weight or an input is on {tensor.device}; all have to be on {device}")
        given = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        plain, outputs_structure = _Plain(module, self.fn_ref.original_forward), []

        def call(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
            rest = iter(inputs)
            args, kwargs = tree_unflatten([next(rest) if leaf is TENSOR else leaf for leaf in given], structure)
            stand_ins = {f"model.{name}": weight for name, weight in zip(named, weights, strict=True)}
            # Rounded weights that autocast keeps would be those of the recording.
            with torch.autocast(device.type, dtype, autocast, cache_enabled=False):
                outputs, outputs_structure[:] = _flatten(functional_call(plain, stand_ins, args, kwargs))
            return outputs

        recording = Recording(call, tensors, list(named.values()), self.recorder)
        return recording, outputs_structure[0]

    def _list_parts(self, module: nn.Module) -> None:
        self.parts = list(module.modules())
        self.children = self._children()

    def _children(self) -> list[int]:
        return [id(child) for part in self.parts for child in part._modules.values()]

    def _state(self, module: nn.Module) -> tuple[Any, ...]:
        """Return where the weights lie and how adapters are set; raises ValueError for hooks on the model's parts."""
        if self._children() != self.children:  # adapters were added or removed
            self.recordings.clear()
            self._list_parts(module)
        state: list[Any] = []
        for part in self.parts:
            _check_hooks(part, part is module)
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None:
                    state.append((tensor.data_ptr(), tensor.dtype, tensor.requires_grad))
            if isinstance(part, BaseTunerLayer):
                scales = [f"{scale:.5g}" for scale in getattr(part, "scaling", {}).values()]
                state += [part.disable_adapters, *part.active_adapters, *part.merged_adapters, *scales]
        return tuple(state)


class _Replay(torch.autograd.Function):
    """A recorded call as a node of autograd, whose inputs are the recording's sources."""

    @staticmethod
    def forward(ctx: Any, graphs: Graphs, recording: Recording, *sources: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        outputs = graphs.replay(recording)
        ctx.graphs, ctx.recording, ctx.turn = graphs, recording, graphs.turn
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.graphs.replay_backward(ctx.recording, ctx.turn, gradients)


class _Plain(nn.Module):
    """A model's forward without the hook, as a module in which weights can be replaced."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        self.model, self.own_forward = model, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.own_forward(*args, **kwargs)


def _flatten(outputs: Any) -> tuple[list[Tensor], list[Any]]:
    tensors, structure = tree_flatten(outputs)
    return tensors, [structure]


def _kind(leaf: Any) -> Any:
    """Return of an argument what a recording depends on."""
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    return tuple(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad


def _modes(device_type: str) -> tuple[Any, ...]:
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), enabled, dtype


def _check_hooks(part: nn.Module, is_model: bool) -> None:
    """Raise ValueError for hooks, which a replay would leave out; PyTorch's own on the whole model run around it."""
    registry: Any = vars(part).get("_diffusers_hook")
    hooks = {*(registry.hooks if registry else ())} - {NAME}
    if hooks or "_hf_hook" in vars(part) or (not is_model and (part._forward_hooks or part._forward_pre_hooks)):
        raise ValueError(
            f"graphs: {type(part).__name__} has hooks ({', '.join(hooks) or 'of PyTorch or accelerate'}), which offloading, "
            "caches and casts of layers set and a replay leaves out; remove them, or disable graphs"
        )
