"""Fine-tuning: what trains (`select`), small edits of the parameters (`deltas`), a frozen base in
fewer bytes (`shrink`), features computed once (`features`), what was trained apart from its base
(`store`), and several tasks on one base in one batch (`serve`)."""
