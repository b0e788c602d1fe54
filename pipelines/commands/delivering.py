"""What commands say where MLflow did not take what was delivered to it."""

from collections.abc import Callable

import click


def delivered(deliver: Callable[[], None]) -> bool:
    """Deliver to MLflow; where it does not take it, say so and return False."""
    from pipelines.mlflow_store import DeliveryError

    try:
        deliver()
    except DeliveryError as error:
        click.echo(f"moeify: warning: {error}", err=True)
        return False
    return True
