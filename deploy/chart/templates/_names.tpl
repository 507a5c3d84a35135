{{- define "evenhand.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "evenhand.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- /* What a selector may name: these do not change from release to release. */}}
{{- define "evenhand.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "evenhand.image" -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end }}

{{- define "evenhand.adminSecret" -}}
{{ default (printf "%s-admin" (include "evenhand.name" .)) .Values.admin.existingSecret }}
{{- end }}

{{- define "evenhand.hasTenants" -}}
{{- if or .Values.tenants.list .Values.tenants.existingSecret }}yes{{ end }}
{{- end }}

{{- /* The variable through which gateways and workers know their Redis. */}}
{{- define "evenhand.redis" -}}
- name: EVENHAND_REDIS_URL
  {{- if .Values.redis.existingSecret }}
  valueFrom:
    secretKeyRef: {name: {{ .Values.redis.existingSecret }}, key: redis-url}
  {{- else if .Values.redis.url }}
  value: {{ kindIs "slice" .Values.redis.url | ternary (toJson .Values.redis.url) .Values.redis.url | quote }}
  {{- else }}
  value: redis://{{ include "evenhand.name" . }}-redis:6379/0
  {{- end }}
{{- end }}

{{- define "evenhand.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "evenhand.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Values that only make sense together: each refusal names the value and what is allowed. */}}
{{- define "evenhand.check" -}}
{{- if not (or .Values.admin.key .Values.admin.existingSecret) }}
{{- fail "admin.key: set it to 16 characters or more, or admin.existingSecret to a secret that has it under `admin-key`" }}
{{- end }}
{{- if and .Values.redis.enabled (or .Values.redis.url .Values.redis.existingSecret) }}
{{- fail "redis.enabled: set it to false where redis.url or redis.existingSecret names a Redis of yours" }}
{{- end }}
{{- if not (or .Values.redis.enabled .Values.redis.url .Values.redis.existingSecret) }}
{{- fail "redis: workers join over Redis, so set redis.enabled, redis.url or redis.existingSecret" }}
{{- end }}
{{- if and .Values.tenants.list .Values.tenants.existingSecret }}
{{- fail "tenants: set tenants.list or tenants.existingSecret, not both" }}
{{- end }}
{{- $batch := default dict .Values.gateway.settings.batch }}
{{- if and $batch.files_url (not $batch.shared) }}
{{- fail "gateway.settings.batch.shared: set it to true, for pods share no folder; batches are then in Redis" }}
{{- end }}
{{- $roles := dict }}
{{- range $name, $given := .Values.workers }}
{{- if not (kindIs "invalid" $given) }}
{{- $worker := mergeOverwrite (deepCopy $.Values.workerDefaults) $given }}
{{- $_ := set $roles $worker.role $name }}
{{- if and $worker.storage.size $worker.storage.existingClaim }}
{{- fail (printf "workers.%s.storage: set size for a volume of each pod, or existingClaim for a shared one, not both" $name) }}
{{- end }}
{{- if gt (int $worker.multiNode.nodes) 1 }}
{{- if ne $worker.role "both" }}
{{- fail (printf "workers.%s.multiNode: an engine over several nodes has role both, not %s" $name $worker.role) }}
{{- end }}
{{- if $worker.storage.size }}
{{- fail (printf "workers.%s.storage.size: the pods of a group need existingClaim, a volume that all of them can mount, or neither" $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- if and (hasKey $roles "prefill") (not (hasKey $roles "decode")) }}
{{- fail (printf "workers.%s.role: a worker with role prefill only reads prompts; add one with role decode" (get $roles "prefill")) }}
{{- end }}
{{- end }}
