"""What each process of a distributed test runs; started by ``accelerate launch`` or ``torchrun``.

python -m tests.distributed_run MODE FOLDER [options as JSON]
"""

import json
import os
import signal
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from gisp_hf import GISPPruner, RestoreConfig, prune, scoring_only
from tests.lora import Watch, recover
from tests.runs import make_trainer, tiny_config
from tests.tiny import tiny_blocks, tiny_model


class CountSyncs(TrainerCallback):
    """Counts the gradient buckets that DDP reduces, by a communication hook of DDP's own."""

    trainer: Trainer

    def __init__(self) -> None:
        self.passes = 0
        self.backward = 0
        self.elements = 0

    def on_train_begin(self, args, state, control, **kwargs):
        def hook(_, bucket):
            self.passes += bucket.is_last()
            self.elements += bucket.buffer().numel()
            future = ALL_REDUCE(bucket.buffer() / dist.get_world_size(), async_op=True).get_future()
            return future.then(lambda done: done.value()[0])

        self.trainer.model_wrapped.register_comm_hook(None, hook)

    def on_substep_end(self, args, state, control, **kwargs):
        self.backward += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.backward += 1


ALL_REDUCE = dist.all_reduce


def record_traffic() -> dict[str, list[int]]:
    """Numbers in each all-reduce and reduce-scatter from now on, but for those of DDP's hook."""
    traffic: dict[str, list[int]] = {"all_reduce": [], "reduce_scatter": []}
    scatter = dist.reduce_scatter_tensor

    def all_reduce(tensor, *args, **kwargs):
        traffic["all_reduce"].append(tensor.numel())
        return ALL_REDUCE(tensor, *args, **kwargs)

    def reduce_scatter_tensor(output, input, *args, **kwargs):
        traffic["reduce_scatter"].append(input.numel())
        return scatter(output, input, *args, **kwargs)

    dist.all_reduce, dist.reduce_scatter_tensor = all_reduce, reduce_scatter_tensor
    return traffic


def write_traffic(folder: Path, traffic: dict, engine) -> None:
    scores = [None if score is None else score.tolist() for score in engine.scores]
    (folder / "traffic.json").write_text(json.dumps({**traffic, "scores": scores}))


class Disturb(TrainerCallback):
    """Makes one rank differ, or die, at a step."""

    def __init__(self, kind: str, rank: int, step: int) -> None:
        self.kind, self.rank, self.step = kind, rank, step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.process_index == self.rank and state.global_step + 1 == self.step:
            if self.kind == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad = torch.randn_like(parameter.grad)


def run_ddp(folder: Path, options: dict) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    disturb = options.pop("disturb", None)
    dtype = getattr(torch, options.pop("dtype", "float32"))
    config = tiny_config(num_steps=options.pop("num_steps", 5), method=options.pop("method", "gisp"))
    by_function = options.pop("by_function", False)
    if options.pop("uneven", False):
        options["train_dataset"] = uneven_blocks()
    gated = options.pop("gated", None)
    model = tiny_model(dtype=dtype) if gated is None else gated_model(*gated)
    restore = RestoreConfig(**options.pop("restore")) if "restore" in options else None
    traffic = record_traffic()
    pruner = GISPPruner(config, folder / "levels", restore=restore)
    with scoring_only(model):
        trainer = make_trainer(
            model,
            folder,
            pruner=pruner,
            per_device_train_batch_size=8 // world,
            gradient_accumulation_steps=2,
            ddp_timeout=60,
            **options,
        )
    if disturb:
        trainer.callback_handler.callbacks.insert(0, Disturb(**disturb))
    counter = CountSyncs()
    counter.trainer = trainer
    if world > 1:
        trainer.add_callback(counter)
    if by_function:
        trainer.remove_callback(pruner)
        prune(trainer, config, folder / "levels")
    else:
        trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    if trainer.is_world_process_zero():
        facts = {"world": world, "syncs": counter.passes, "backward": counter.backward}
        facts["wrapper"] = type(trainer.model_wrapped).__name__
        (folder / "facts.json").write_text(json.dumps(facts))
        if not by_function:
            write_traffic(folder, {**traffic, "buckets": counter.elements}, pruner.engine)


def gated_model(base: str, name: str):
    """The checkpoint, quantized as ``tests.test_gated`` names it, or with its adapters."""
    from tests.test_gated import adapted, load

    torch.manual_seed(0)  # one half of an adapter is random
    return adapted(load(Path(base)), seed=1) if name == "lora" else load(Path(base), name)


def uneven_blocks() -> list[dict[str, torch.Tensor]]:
    """16 blocks, of which one to fifteen tokens are targets."""
    blocks = tiny_blocks(16)
    for number, block in enumerate(blocks):
        block["labels"][: number % 15] = -100
    return blocks


def run_recover(folder: Path, options: dict) -> None:
    """Adapters on a level, with its base as the teacher: as many blocks a step as one process has."""
    watch = Watch()
    recover(
        Path(options["level"]),
        folder / "out",
        teacher=AutoModelForCausalLM.from_pretrained(options["base"]),
        callbacks=[watch],
        per_device_train_batch_size=4 // int(os.environ["WORLD_SIZE"]),
        ddp_timeout=60,
    )
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(watch.losses))


def run_fsdp2(folder: Path, options: dict) -> None:
    """The engine on a model sharded by fully_shard; Accelerate itself does not shard on a CPU."""
    from torch.distributed.fsdp import fully_shard

    from gisp_hf.levels.save import save_level
    from gisp_hf.models import discover
    from gisp_hf.models.fingerprint import fingerprint
    from gisp_hf.models.shards import model_fingerprint
    from gisp_hf.pruning.engine import Engine
    from gisp_hf.pruning.methods import find_method
    from gisp_hf.pruning.trajectory import Base, Trajectory
    from gisp_hf.training.distributed import check_agreement
    from tests.tiny import tiny_tokenizer

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    family = options["family"]
    model = tiny_model(family)
    whole_fingerprint = fingerprint(model.named_parameters())
    config = tiny_config(sparsity_levels=(0.2, 0.4), method=options.get("method", "gisp"))
    layout = discover(model, find_method(config.method).kinds)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert model_fingerprint(model.named_parameters()) == whole_fingerprint
    engine = Engine(model, layout, config, shrink=False)
    model.train()
    stack = ExitStack()
    stack.enter_context(engine.watch())
    of_weights = engine.criterion.needs == "weight_gradients"
    scored = set(engine.scored_parameters()) if of_weights else {"model.norm.weight"}
    traffic = record_traffic()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in scored)

    collectives: list[int] = []
    reduce = dist.all_reduce
    ids = torch.stack([block["input_ids"] for block in tiny_blocks(16)]).chunk(world)[rank]
    base = Base("tiny", None, whole_fingerprint)
    for target in (0.1, 0.2, 0.3, 0.4):
        model(input_ids=ids, labels=ids).loss.backward()
        dist.all_reduce = lambda tensor, *a, **k: (collectives.append(tensor.numel()), reduce(tensor, *a, **k))[1]
        engine.accumulate()
        dist.all_reduce = reduce
        engine.advance(target)
        check_agreement(engine.order, step=1, device=torch.device("cpu"))
        if target in config.sparsity_levels:
            trajectory = Trajectory(layout, tuple(r.clone() for r in engine.order), config, base)
            save_level(
                model,
                folder / f"sparsity-{target:.2f}",
                trajectory=trajectory,
                sliced=False,
                tokenizer=tiny_tokenizer(),
                main_process=rank == 0,
                max_shard_size=20_000,
            )
    if rank == 0:
        trajectory.save(folder)
        (folder / "facts.json").write_text(json.dumps({"collectives": collectives, "world": world}))
        write_traffic(folder, traffic, engine)
    stack.close()
    dist.barrier()
    dist.destroy_process_group()


def steps_with_gates(model, ids: torch.Tensor, config):
    """Four steps of an engine on a model with adapters, whose structures go by gates."""
    from gisp_hf.models import discover
    from gisp_hf.models.wrapped import bare_model
    from gisp_hf.pruning.engine import Engine

    bare = bare_model(model)
    engine = Engine(bare, discover(bare), config, shrink=False, gates=True)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # as a run does it
            module.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("model.norm.weight"))
    with engine.watch():
        for target in (0.1, 0.2, 0.3, 0.4):
            model(input_ids=ids, labels=ids).loss.backward()
            engine.accumulate()
            engine.advance(target)
    return engine


def run_fsdp2_adapters(folder: Path, options: dict) -> None:
    """The engine on a model with LoRA adapters, sharded by fully_shard."""
    from torch.distributed.fsdp import fully_shard

    from gisp_hf.models.wrapped import bare_model

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    model = gated_model(options["base"], "lora")
    for layer in bare_model(model).model.layers:
        fully_shard(layer)
    fully_shard(model)
    traffic = record_traffic()
    ids = torch.stack([block["input_ids"] for block in tiny_blocks(16)]).chunk(world)[rank]
    config = tiny_config(sparsity_levels=(0.2, 0.4), method="gisp-activation")
    engine = steps_with_gates(model, ids, config)
    if rank == 0:
        write_traffic(folder, traffic, engine)
        (folder / "order.json").write_text(json.dumps([order.tolist() for order in engine.order]))
    dist.barrier()
    dist.destroy_process_group()


def run_answers(folder: Path, options: dict) -> None:
    """Every process has answers of its own, and writes those that it got."""
    from gisp_hf.training.distributed import from_first_rank

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    got = from_first_rank(options["answers"][rank], device=torch.device("cpu"))
    folder.joinpath(f"{rank}.json").write_text(json.dumps(got))
    dist.barrier()
    dist.destroy_process_group()


def run_restore(folder: Path, options: dict) -> None:
    """Restoration in memory; every process writes what it got."""
    from safetensors.torch import save_file

    from gisp_hf import restore
    from tests.restoring import pair
    from tests.tiny import tiny_blocks

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    base, level = pair("gemma2")
    record = restore(level, base, tiny_blocks(44), RestoreConfig(**options), progress=False)
    rank = dist.get_rank()
    save_file({name: p.detach().contiguous() for name, p in level.named_parameters()}, folder / f"{rank}.safetensors")
    folder.joinpath(f"{rank}.json").write_text(json.dumps(record.to_dict()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    settings = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    modes = {"ddp": run_ddp, "fsdp2": run_fsdp2, "recover": run_recover, "restore": run_restore, "answers": run_answers}
    modes["fsdp2-adapters"] = run_fsdp2_adapters
    modes[sys.argv[1]](Path(sys.argv[2]), settings)
