"""Coordinate check of config/ladder.py: do its learning rates transfer from one width to another?

$ python prepare shakespeare
$ python benchmarks/coordinates.py --picture coordinates.png

Models of equal depth and different width make a few updates with the same rates. The picture shows by how much these
change the output of each block and the logits, as root mean square over tokens and channels. If the lines are flat, a
rate that suits one width suits all: https://arxiv.org/abs/2203.03466, appendix D.1.
"""

import argparse
import statistics

import bench
import torch
from bench import REPO

from acorn import settings
from acorn.data.batches import sample_windows
from acorn.data.shards import load_dataset
from acorn.training.optim import make_optimizers
from acorn.training.start import new_model
from train import TrainSettings


@torch.no_grad()
def activations(model, x) -> dict[str, torch.Tensor]:
    """Return the output of the embedding, of each block, and the logits, by name, for tokens x (B, T)."""
    found = {}
    modules = {"embedding": model.transformer.wte, "logits": model.lm_head}
    modules |= {f"block {i}": block for i, block in enumerate(model.transformer.h, start=1)}
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: found.update({name: output.clone()}))
        for name, module in modules.items()
    ]
    model(x, x)
    for hook in hooks:
        hook.remove()
    return found


def changes(s: TrainSettings, data, n_updates: int) -> dict[str, float]:
    """Return the root mean square change of each activation after some updates."""
    torch.manual_seed(s.seed)
    model = new_model(s, data.vocab_size, meta=False)
    rates = (s.learning_rate, s.muon_lr, s.weight_decay, (s.beta1, s.beta2))
    optimizers = make_optimizers(model, s.optimizer, *rates, "cpu", torch.float32, s.muon_split, s.muon_momentum)
    held_out, before = torch.from_numpy(sample_windows(data.val, s.block_size, 0, 16, 0)[0]), {}
    for step in range(n_updates):
        x, y = map(torch.from_numpy, sample_windows(data.train, s.block_size, 16 * step, 16, s.seed))
        if step == 1:  # not 0: zero-initialized blocks have no gradient in the first update
            before = activations(model, held_out)
        model(x, y)[1].backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    after = activations(model, held_out)
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="64,128,256,512")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--dataset", default="plays")
    parser.add_argument("--picture", default="", help="plot the changes over the width into this PNG file")
    args = bench.parse_args(parser)

    data, rows = load_dataset(args.dataset), []
    words = [str(REPO / "config/ladder.py"), f"--n_layer={args.depth}"]
    for width in map(int, args.widths.split(",")):
        found = []
        for seed in range(args.seeds):
            more = [f"--n_embd={width}", f"--n_head={width // 32}", f"--seed={seed}"]
            s = settings.build(TrainSettings, settings.parse(TrainSettings, [*words, *more]))
            found.append(changes(s, data, args.updates))
        means = {name: statistics.mean(each[name] for each in found) for name in found[0]}
        rows.append({"width": width} | {name: f"{value:.3f}" for name, value in means.items()})
        bench.print_row(rows)
    if args.picture:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for name in list(rows[0])[1:]:
            axes.plot([row["width"] for row in rows], [float(row[name]) for row in rows], marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="width", ylabel=f"RMS change after {args.updates} updates")
        axes.set_xticks([row["width"] for row in rows], [str(row["width"]) for row in rows])
        axes.minorticks_off()
        axes.legend()
        figure.savefig(args.picture, dpi=120)


if __name__ == "__main__":
    main()
