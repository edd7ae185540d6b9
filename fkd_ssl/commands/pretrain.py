"""Pretrains a teacher on a folder of images: MoCo v2, with lightly's parts, saved in MoCo's own checkpoint layout.

For ImageNet use a published teacher (fkd-ssl teachers); this is for images of your own. The same options continue a
killed run.
"""

from fkd_ssl.pretrain_config import PretrainConfig as Config


def run(config: Config) -> int:
    """Pretrains and says where the teacher is."""
    from fkd_ssl.commands import console
    from fkd_ssl.pretrain import pretrain

    checkpoint = pretrain(config, log=console.say)
    console.show(f"{checkpoint}: pass it as --teacher mocov2 --checkpoint {checkpoint}")
    return 0
