"""Certificates: how far the cosine between clean and attacked features can fall."""

from fs_plugins.certificates.certificate import Angular, Certificate, PredictionCertificate

__all__ = ["Angular", "Certificate", "PredictionCertificate"]
