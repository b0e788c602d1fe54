# %% [markdown]
# # Split a network from a notebook
#
# Ten handwritten digits, an autoencoder, an expert tree. Open this file as a notebook (it is in percent format), or run
# it as a script; it takes well under a minute on one core.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import moeify
from attribution.measure import measure
from attribution.subject import Subject, batched
from moeify.events import Step
from moeify.models.build import Autoencoder
from moeify.routed.split_model import SplitModel

images, labels = load_digits(return_X_y=True)
images, labels = torch.from_numpy(images / 16).float(), torch.from_numpy(labels)
data = {str(digit): images[labels == digit] for digit in range(10)}
torch.manual_seed(0)
network = Autoencoder(inputs=64, hidden=96, code=12)

# %% [markdown]
# ## Fit
#
# The network is trained and split, here in one round with an expert for each digit, beside a dense twin that sees the
# same rows and is never split. Any section of a recipe may be given as a keyword: the learning rate, and how small an
# expert may be.

# %%
found = moeify.fit(
    network,
    data,
    loss="pixels",
    steps=240,
    separation=0.4,
    branching=10,
    rows=100,
    controls=["random"],
    training={"learning_rate": 4e-3, "weight_decay": 0.0},
    partition={"min_units": 2},
)
split, result = found.split, found.result
print(f"active: {result.active_fraction['mean']:.0%} of the units")
for arm, losses in result.test_loss.items():
    print(f"{arm:7} {sum(losses.values()) / len(losses):.3f} nats an image")


# %%
def show_tree(node: dict, depth: int = 0) -> None:
    print(f"{'  ' * depth}{node['name']}: {node['units']} units")
    for child in node["children"]:
        show_tree(child, depth + 1)


show_tree(result.tree)

# %% [markdown]
# ## Look
#
# The curves of both models, and what removing each expert does to each digit.

# %%
steps = [event for event in found.events.events.values() if isinstance(event, Step)]
figure, (curves, matrix) = plt.subplots(1, 2, figsize=(11, 4))
for arm in ("dense", "split"):
    mine = [event for event in steps if event.arm == arm]
    curves.plot([event.step for event in mine], [sum(e.loss.values()) / len(e.loss) for e in mine], label=arm)
curves.set(xlabel="step", ylabel="nats an image", yscale="log")
curves.legend()
experts = list(result.own_other["0"])
rises = [[result.own_other[category][expert] for category in found.task.categories] for expert in experts]
matrix.imshow(rises, aspect="auto", cmap="viridis")
matrix.set(xticks=range(10), yticks=range(len(experts)), yticklabels=experts, xlabel="digit", title="rise without it")
plt.show()

# %% [markdown]
# Which images each expert is most active on, and how much worse they are drawn without it:

# %%
for each in found.portraits().experts[:4]:
    most = ", ".join(f"{example.category} ({example.activity:.0%})" for example in each.active)
    print(f"{each.expert:12} loss {each.rise:+.3f} without it; most active on {most}")

# %% [markdown]
# ## Take apart
#
# `ablate` gives a model without a category's own experts, `extract` one that serves a category alone. Both are models
# of their own, smaller than the one they come from, and can be saved.

# %%
without = moeify.ablate(split, "3")
before, after = found.loss(split), found.loss(without)
for digit in found.task.categories:
    print(f"{digit}: {before[digit]:.3f} -> {after[digit]:.3f}{'  <- taken out' if digit == '3' else ''}")
alone = moeify.extract(split, "7")
print(f"units: {split.space.units} in all, {without.space.units} without 3, {alone.space.units} for 7 alone")
with torch.no_grad():
    sevens = data["7"][:5]
    same = (alone(sevens, torch.zeros(5, dtype=torch.long)) - split(sevens, torch.full((5,), 7))).abs().max()
print(f"the extracted model differs from the whole by {same:.1e} at most")

# %% [markdown]
# ## Attribution alone
#
# No split is needed to ask which unit matters to which digit: any network with named sites and any loss will do.

# %%
dense: SplitModel = found.dense
subject = Subject(dense.network, dense.space.readers, found.task.categories, found.task.nats, run=dense)
with dense.masked():  # run every unit through plain modules, which attribution reads
    table = measure(subject, batched(images, images, labels, rows_at_once=300))
for site in dense.space.readers:
    strongest = table.score(site.name, "absolute").argmax(0)
    print(site.name, "the unit that matters most to each digit:", strongest.tolist())
