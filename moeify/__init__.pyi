"""What ``moeify`` offers, for type checkers and editors; each name loads on first use."""

from moeify.attributing import attribute as attribute
from moeify.fitting import fit as fit
from moeify.fitting import split as split
from moeify.loop import run as run
from moeify.recipe.config import RunConfig as RunConfig
from moeify.recipe.load import load_recipe as load_recipe
from moeify.split_folder import load_split as load_split
from moeify.split_folder import save_split as save_split
from moeify.tasks.build import build_task as build_task
