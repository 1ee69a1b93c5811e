from fastapi import APIRouter
from .api import told


def router(service):
    return APIRouter()
