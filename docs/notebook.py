# %% [markdown]
# # Split a network from a notebook
#
# Ten handwritten digits, an autoencoder, an expert tree. Open this file as a notebook (it is in percent format), or run
# it as a script; it takes well under a minute on one core.

# %%
import torch
from sklearn.datasets import load_digits

import moeify
from attribution import heatmap
from moeify.models.build import Autoencoder

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
# expert may be. What comes back shows its tree and its losses, in a notebook as tables.

# %%
split = moeify.fit(
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
print(split)

# %% [markdown]
# ## Look
#
# The expert tree; the curves of all models; what removing each expert does to each digit; which unit matters to which
# digit. Each is a matplotlib figure, shown where it is a cell's last value.

# %%
split.plot_tree()

# %%
split.plot_curves()

# %%
split.plot_removals()

# %%
split.plot_attribution()

# %% [markdown]
# Which images each expert is most active on, and how much worse they are drawn without it:

# %%
for each in split.portraits().experts[:4]:
    most = ", ".join(f"{example.category} ({example.activity:.0%})" for example in each.active)
    print(f"{each.expert:12} loss {each.rise:+.3f} without it; most active on {most}")

# %% [markdown]
# ## Take apart
#
# `ablate` gives a split without a category's own experts, `extract` a dense network that serves a category alone. Both
# are smaller than what they come from; `export` writes either to a folder.

# %%
without = split.ablate("3")
before, after = split.test_loss["split"], without.test_loss["split"]
for digit in split.categories:
    print(f"{digit}: {before[digit]:.3f} -> {after[digit]:.3f}{'  <- taken out' if digit == '3' else ''}")
alone = split.extract("7")
units = alone.encoder.up.out_features + alone.decoder.up.out_features
print(f"units: {split.model.space.units} in all, {without.model.space.units} without 3, {units} for 7 alone")
with torch.no_grad():
    sevens = data["7"][:5]
    same = (alone(sevens) - split.model(sevens, torch.full((5,), 7))).abs().max()
print(f"the extracted network differs from the whole by {same:.1e} at most")

# %% [markdown]
# ## A cut alone
#
# `moeify.split` cuts a trained network as it is: no training before or after it, so its tax is what the cut costs by
# itself. With no recovery it should not go deep.

# %%
cut = moeify.split(split.dense, data, loss="pixels", separation=0.2, partition={"min_units": 2})
print(
    f"{cut.partition.separation:.0%} of the units off: tax {cut.tax['mean']:+.3f} nats an image, without any training"
)

# %% [markdown]
# ## Attribution alone
#
# No split is needed to ask which unit matters to which digit. Any module will do, with `sites=` where moeify does not
# know where its units are.

# %%
table = moeify.attribute(split.dense, data, loss="pixels")
for site in table.sites:
    strongest = table.score(site, "absolute").argmax(0)
    print(site, "the unit that matters most to each digit:", strongest.tolist())
heatmap.plot(table)
