"""Pretrains a teacher on a folder of images: MoCo v2 or SwAV, with lightly's parts, saved in the method's own layout.

For ImageNet use a published teacher (fkd-ssl teachers); this is for images of your own. MoCo v2 also trains a small network
without a teacher, to compare with. The same options continue a killed run.
"""

from fkd_ssl.pretraining.config import PretrainConfig as Config


def run(config: Config) -> int:
    """Pretrains and says where the teacher, or the student, is."""
    from fkd_ssl.commands import console
    from fkd_ssl.pretraining.engine import pretrain

    with console.skipping(config.on_unreadable):
        checkpoint = pretrain(config, log=console.say)
    use = f"--teacher {config.method} --checkpoint {checkpoint}" if config.is_teacher else f"--model {checkpoint} or --init"
    console.show(f"{checkpoint}: pass it as {use}")
    return 0
