"""Fréchet distance of sampled to true clips in the latents of one of our own MAE tokenizers.

It stands in for the Fréchet video distance (arXiv 1812.01717), whose features come from an I3D network trained on Kinetics:
implementations fetch its weights from a third party's server when they run, and it has never seen a game. This is not that
number, must not be called so, and compares with nothing but values from the same tokenizer run, clip length and number of
clips.
"""

import numpy as np


def clip_features(latent_BTNL: np.ndarray, window: int) -> np.ndarray:
    """What a clip looks like and how it moves, as one vector: (B, 2L) float64.

    The first L entries are the mean latent over frames and patches, the last L the mean absolute change of a patch's latent
    from a frame to the next, without the changes from one window to the next.

    Args:
        latent_BTNL: the tokenizer's latents; B clips, T frames, N patches, L entries; encoded `window` frames at a time,
            since latents depend on the frames before them in their window.
        window: frames that were encoded together, at least 2 where T is.
    """
    latent_BTNL = np.asarray(latent_BTNL, np.float64)
    change_BTNL = np.abs(np.diff(latent_BTNL, axis=1))
    inside = [t for t in range(change_BTNL.shape[1]) if (t + 1) % window]
    motion_BL = change_BTNL[:, inside].mean((1, 2)) if inside else np.zeros((len(latent_BTNL), latent_BTNL.shape[-1]))
    return np.concatenate([latent_BTNL.mean((1, 2)), motion_BL], axis=1)


def frechet_distance(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the normal distributions fitted to two sets of vectors, in float64.

    |mean difference|² + tr(A + B - 2 (A^½ B A^½)^½) with the sample covariances A and B (Dowson and Landau 1982, "The Fréchet
    distance between multivariate normal distributions"). Biased upwards in small samples: two sets from one distribution are
    apart by an amount that falls as 1/N and grows with D.

    Raises:
        ValueError: a set holds fewer than two vectors.
    """
    if min(len(a_ND), len(b_MD)) < 2:
        raise ValueError("a Fréchet distance needs at least two clips on each side")
    a_ND, b_MD = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
    A, B = np.atleast_2d(np.cov(a_ND, rowvar=False)), np.atleast_2d(np.cov(b_MD, rowvar=False))
    # The symmetric product has the eigenvalues of A·B, but real ones and not below zero but for rounding.
    values, vectors = np.linalg.eigh(A)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ B @ root), 0)).sum()
    distance = np.square(a_ND.mean(0) - b_MD.mean(0)).sum() + np.trace(A) + np.trace(B) - 2 * cross
    return float(max(0.0, distance))
