{{- define "loraretriever.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{- define "loraretriever.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "loraretriever.labels" -}}
{{ include "loraretriever.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- define "loraretriever.image" -}}
image: "{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}"
imagePullPolicy: {{ .image.pullPolicy }}
{{- end }}

{{- /* No service of the namespace puts variables into the pods: those named LORARETRIEVER_ would be taken for settings. */ -}}
{{- define "loraretriever.pod" -}}
serviceAccountName: {{ include "loraretriever.name" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "loraretriever.selector" . | nindent 8 }}
{{- end }}

{{- define "loraretriever.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- with .root.Values.storage.secret }}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end }}
{{- end }}

{{- define "loraretriever.env" -}}
- name: LORARETRIEVER_POOL
  valueFrom:
    secretKeyRef:
      name: {{ required "pool.secret is missing; expected the name of a secret with the pool's URL" .root.Values.pool.secret }}
      key: {{ .root.Values.pool.key }}
- name: LORARETRIEVER_CACHE
  value: /cache/loraretriever
- name: HF_HOME
  value: /cache/huggingface
- name: HOME
  value: /cache
{{- with .root.Values.hub.secret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.root.Values.hub.key }}
{{- end }}
{{- range $name, $value := .values.settings }}
- name: LORARETRIEVER_{{ upper $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "loraretriever.model" -}}
{{ required "baseModel is missing; expected a Hugging Face id or a path in the images" .Values.baseModel }}
{{- end }}
