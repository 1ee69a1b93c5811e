"""References for the caches, in PyTorch: diffusers' own hooks where they run on a U-Net, else their rules by hand.

The by-hand ones always run both halves of guidance. The rows of a batch do not see each other, so that leaving a half
out is the same as not using what it gives: `drop` then puts the conditional half's output in its place.
"""

import copy

import diffusers
import oracle
import torch
from diffusers.hooks import faster_cache
from diffusers.hooks.hooks import HookRegistry

PROMPT = "a small red cat"


def fresh(folder, scheduler):
    """A pipeline whose U-Net may be changed; the rest is shared."""
    pipe = oracle.shared(str(folder))
    parts = pipe.components | {"unet": copy.deepcopy(pipe.unet)}
    parts["scheduler"] = oracle.make_scheduler(pipe.own_scheduler, scheduler)
    options = {"add_watermarker": False} if "tokenizer_2" in parts else {"requires_safety_checker": False}
    result = type(pipe)(**parts, **options)
    result.own_scheduler = pipe.own_scheduler
    result.set_progress_bar_config(disable=True)
    return result


class Masked(oracle.Helper):
    """The pip package's cache with its clock replaced: `decide(call, x, t, ...)`, given what the U-Net is given, says
    whether a call is a full one."""

    decide = None

    def wrap_unet_forward(self):
        self.function_dict["unet_forward"] = forward = self.pipe.unet.forward

        def counted(*args, **kwargs):
            self.full.append(bool(self.decide(len(self.full), *args, **kwargs)))
            self.cur_timestep = 0 if self.full[-1] else 1
            return forward(*args, **kwargs)

        self.pipe.unet.forward = counted


def masked(pipe, decide, branch=0):
    result = Masked(pipe)
    result.decide = decide
    result.set_params(cache_interval=2, cache_branch_id=branch)
    return result


@torch.no_grad()
def draw(pipe, steps, guidance, seed=3, size=64):
    """Latents (1, 4, h, w)."""
    out = pipe(
        PROMPT,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    )
    return out.images.numpy()


class Calls:
    """Wraps a pipeline's U-Net: counts its calls, knows the timestep, and hands the output to `after(call, t, out)`."""

    def __init__(self, pipe, after=lambda call, t, out: out):
        self.number, self.t, forward = -1, None, pipe.unet.forward

        def counted(sample, t, *args, **kwargs):
            self.number, self.t = self.number + 1, float(t)
            kwargs["return_dict"] = False
            return (after(self.number, self.t, forward(sample, t, *args, **kwargs)[0]),)

        pipe.unet.forward = counted


def drop(out):
    """The conditional half's output for both: guidance then has nothing to add to it."""
    given = out.chunk(2)[1]
    return torch.cat([given, given])


def attentions(unet):
    """(module, whether it reads the prompt) of all attention layers in the U-Net's transformers."""
    return [
        (module, name.endswith("attn2")) for name, module in unet.named_modules() if name.endswith(("attn1", "attn2"))
    ]


def wrap_attention(unet, rule):
    """rule(cross, state, compute) -> output; state: a dictionary of the layer's own, compute: runs it."""
    for module, cross in attentions(unet):

        def forward(*args, _plain=module.forward, _cross=cross, _state=None, **kwargs):
            return rule(_cross, _state, lambda: _plain(*args, **kwargs))

        forward.__kwdefaults__["_state"] = {}
        module.forward = forward


def broadcast(pipe, calls, **ranges):
    """diffusers' hook."""
    config = diffusers.PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: calls.t, **ranges)
    diffusers.apply_pyramid_attention_broadcast(pipe.unet, config)


class Denoiser(torch.nn.Module):
    """The U-Net called as FasterCache's hook wants it: everything that has two halves by the names that it knows."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.plain = unet, unet.forward

    def forward(self, hidden_states, encoder_hidden_states, t, added):
        n = len(hidden_states)
        added = None if added is None else {name: value[-n:] for name, value in added.items()}
        return self.plain(hidden_states, t, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


def faster(pipe, guided, weight=None, **options):
    """diffusers' hooks for the denoiser and, on self-attention, for blocks, registered by hand: its own entry point
    finds no layer of a U-Net, and its denoiser hook cannot take a timestep that has no batch."""
    now = {}
    config = faster_cache.FasterCacheConfig(
        current_timestep_callback=lambda: now["t"],
        attention_weight_callback=weight or (lambda _: 0.5),
        tensor_format="BCHW",
        is_guidance_distilled=not guided,
        **options,
    )
    denoiser = Denoiser(pipe.unet)
    faster_cache.apply_faster_cache(denoiser, config)  # fills in the default callbacks; finds no attention
    for module, cross in attentions(pipe.unet):
        if not cross:
            hook = faster_cache.FasterCacheBlockHook(
                config.spatial_attention_block_skip_range,
                config.spatial_attention_timestep_skip_range,
                not guided,
                config.attention_weight_callback,
                config.current_timestep_callback,
            )
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "block")

    def forward(sample, t, encoder_hidden_states, added_cond_kwargs=None, **_):
        now["t"] = float(t)
        both = denoiser(hidden_states=sample, encoder_hidden_states=encoder_hidden_states, t=t, added=added_cond_kwargs)
        return (both,)

    pipe.unet.forward = forward
    return now


def gate_rule(calls, c_of_call, step, sp_interval, fi_interval, warm_up, guided):
    """T-GATE's, from its paper and code, for `wrap_attention`."""

    def rule(cross, state, compute):
        c = c_of_call(calls.number)
        if c == step - 1:
            out = compute()
            state["kept"] = sum(out.chunk(2)).div(2).repeat(2, 1, 1) if guided else out
            return out
        if c < step - 1:
            if cross or c < warm_up:
                return compute()
            if c == warm_up or c % sp_interval == 0:
                state["kept"] = compute()
            return state["kept"]
        if not cross and c % fi_interval == 0:
            state["kept"] = compute()
        return state["kept"]

    return rule


def encoder_layers(unet):
    """The modules that give the skips, outermost first."""
    layers = [unet.conv_in]
    for block in unet.down_blocks:
        layers += [*(getattr(block, "attentions", None) or block.resnets), *(block.downsamplers or [])]
    return layers


def skip_change(unet, branch, threshold, most):
    """Adaptive's rule as `decide` for `masked`, and the list of the changes that it will have seen. Each call is run
    whole on a copy of the U-Net, for the skip at the branch."""
    whole, kept, seen, log = copy.deepcopy(unet), {}, [], []
    encoder_layers(whole)[branch].register_forward_hook(
        lambda _, __, out: seen.append(getattr(out, "sample", out[0] if isinstance(out, tuple) else out))
    )

    def decide(call, *args, **kwargs):
        whole(*args, **kwargs)
        skip, full = seen.pop(), "skip" not in kept
        if not full:
            change = (skip - kept["skip"]).abs().mean((1, 2, 3)) / kept["skip"].abs().mean((1, 2, 3))
            log.append(float(change.max()))
            full = log[-1] >= threshold or call - kept["call"] >= most
        if full:
            kept.update(skip=skip, call=call)
        return full

    return decide, log
