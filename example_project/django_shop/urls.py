"""The pages of the shop, and its admin."""

from __future__ import annotations

from django.contrib import admin
from django.urls import path

from . import views

urlpatterns = [
    path("", views.shop, name="shop"),
    path("orders/<int:pk>/", views.order, name="order"),
    path("admin/", admin.site.urls),
]
