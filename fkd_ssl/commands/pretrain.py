"""Pretrains a teacher on images with MoCo v2 or SwAV, and saves it in the layout of the method's own code.

It is meant for your own images; for ImageNet use a published teacher (fkd-ssl teachers). MoCo v2 can also train a small network
without a teacher, as a baseline. To continue a killed run, repeat the command.
"""

from fkd_ssl.pretraining.config import PretrainConfig as Config


def run(config: Config) -> int:
    """Pretrains a network and prints the path of its weights."""
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.pretraining.engine import pretrain

    console.log(resolve.describe_machine())
    with console.skipping(config.on_unreadable):
        checkpoint = pretrain(config, log=console.log)
    use = f"--teacher {config.method} --checkpoint {checkpoint}" if config.is_teacher else f"--model {checkpoint} or --init"
    console.print_result(f"{checkpoint}: pass it as {use}")
    return 0
