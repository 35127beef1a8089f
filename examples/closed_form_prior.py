"""A closed-form method with a prior of its own: the covariance of keys without its correlations.

python examples/closed_form_prior.py
"""

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.methods import MEMIT
from kedit_lightning.methods.locate.shared.least_squares import Prior


class DiagonalMEMIT(MEMIT):
    """MEMIT with ``G = λ diag(C)``: each dimension of the keys counts by itself."""

    def prior(self, layer: int) -> Prior:
        """``G⁻¹ K`` for keys ``K`` of shape ``[d_in, n]``."""
        moment = self.covariances.second_moment(self.base.layout.block(layer).down)
        cost = self.settings.preserve * moment.diagonal()[:, None]
        return lambda keys: keys / cost.to(keys)


def main() -> None:
    """Write one fact into the packaged model with both priors."""
    base = BaseModel.load("nano")
    request = EditRequest("The capital of France is", "Lyon", subject="France")
    for kind in (MEMIT, DiagonalMEMIT):
        edit = kind(base).edit([request])
        size = sum(float(delta.norm()) for delta in edit.deltas().values())
        with edit:
            (answer,) = base.generate([request.prompt], max_new_tokens=2)
        print(f"{kind.__name__}: size {size:.2f}, {request.prompt} ->{answer}")


if __name__ == "__main__":
    main()
